//! Asking providers for what they keep of the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use prost::Message;
use us_core::tls::{ExpectedPeer, Identity, Role};
use us_core::wire::connect_grpc;
use us_proto::v1::recovery_client::RecoveryClient;
use us_proto::v1::recovery_page::Content;
use us_proto::v1::{KeptRoot, ReadRecoveryRequest, StoreRecords};

use super::merge::Runs;
use crate::recovery::{Manifest, RecoveryKit, RunLabel, RunSeal, open_root};

/// How long a provider may take for the next piece of its answer.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The largest message taken.
const MESSAGE_BYTES_MAX: usize = 32 << 20;

/// What the providers have together.
#[derive(Debug)]
pub struct Collected {
    /// The newest root.
    pub manifest: Manifest,
    /// Their records.
    pub runs: Runs,
    /// Who answered.
    pub reached: Vec<String>,
    /// Who did not, and why.
    pub unreached: Vec<(String, String)>,
}

/// What one provider has.
#[derive(Debug)]
struct Answer {
    root: KeptRoot,
    messages: Vec<StoreRecords>,
}

async fn ask(address: &str, identity: &Identity) -> anyhow::Result<Answer> {
    let expected = ExpectedPeer::role(Role::Provider);
    let channel = connect_grpc(address, identity, expected).await?;
    let mut client = RecoveryClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = client.read(ReadRecoveryRequest {});
    let mut pages = tokio::time::timeout(SILENCE_MAX, request)
        .await
        .context("it does not answer")??
        .into_inner();
    let mut answer = Answer { root: KeptRoot::default(), messages: Vec::new() };
    loop {
        let page = tokio::time::timeout(SILENCE_MAX, pages.message());
        match page.await.context("it fell silent")??.map(|page| page.content) {
            None => return Ok(answer),
            Some(Some(Content::Root(root))) => answer.root = root,
            Some(Some(Content::Records(records))) => answer.messages.push(records),
            Some(None) => {}
        }
    }
}

/// Asks the providers at `addresses`, then all that the newest root names.
///
/// # Errors
/// When nobody answers, or nobody has a root that the key opens.
pub async fn collect(
    kit: &RecoveryKit,
    identity: &Identity,
    addresses: &[String],
) -> anyhow::Result<Collected> {
    let mut asked = BTreeSet::new();
    let mut answers: Vec<(String, Answer)> = Vec::new();
    let mut unreached: Vec<(String, String)> = Vec::new();
    let mut next: Vec<String> = addresses.to_vec();
    while !next.is_empty() {
        next.retain(|address| asked.insert(address.clone()));
        let asking = next
            .iter()
            .map(|address| async move { (address.clone(), ask(address, identity).await) });
        for (address, answer) in futures::future::join_all(asking).await {
            match answer {
                Ok(answer) => answers.push((address, answer)),
                Err(error) => unreached.push((address, format!("{error:#}"))),
            }
        }
        let newest = newest_root(kit, &answers);
        let named = newest.iter().flat_map(|manifest| &manifest.providers);
        next = named.map(|provider| provider.address.clone()).collect();
        next.retain(|address| !asked.contains(address));
    }
    if answers.is_empty() {
        bail!("no provider answered{}", reasons(&unreached));
    }
    let Some(manifest) = newest_root(kit, &answers) else {
        bail!("{}{}", no_root(kit, &answers), reasons(&unreached));
    };
    let messages = answers.iter().flat_map(|(_, answer)| &answer.messages);
    let runs = open_records(kit, messages);
    let reached = answers.into_iter().map(|(address, _)| address).collect();
    Ok(Collected { manifest, runs, reached, unreached })
}

fn reasons(unreached: &[(String, String)]) -> String {
    unreached.iter().map(|(address, why)| format!("\n  {address}: {why}")).collect()
}

fn no_root(kit: &RecoveryKit, answers: &[(String, Answer)]) -> String {
    let has_root = answers.iter().find(|(_, answer)| !answer.root.root.is_empty());
    match has_root {
        Some((address, _)) => format!(
            "the recovery key (of cluster {}) does not open the root that {address} keeps: it is \
             another key, or the root is damaged",
            kit.cluster()
        ),
        None => "the providers that answered keep no root of a directory".to_owned(),
    }
}

fn newest_root(kit: &RecoveryKit, answers: &[(String, Answer)]) -> Option<Manifest> {
    let opened = answers.iter().filter_map(|(_, answer)| {
        let manifest = open_root(kit.secret(), &answer.root.root)?;
        let manifest = Manifest::decode(&manifest[..]).ok()?;
        (manifest.cluster == kit.cluster().as_bytes()[..]).then_some(manifest)
    });
    opened.max_by_key(|manifest| manifest.sequence)
}

/// A record's parts: whether it is the last, and its plaintext.
type Parts = BTreeMap<u32, (bool, Vec<u8>)>;

/// Opens what can be opened; a part that fails its seal is as good as missing, and does not hide the
/// good one of another provider.
pub(super) fn open_records<'a>(
    kit: &RecoveryKit,
    messages: impl Iterator<Item = &'a StoreRecords>,
) -> Runs {
    let mut opened: BTreeMap<RunLabel, (RunSeal, BTreeMap<u64, Parts>)> = BTreeMap::new();
    for message in messages {
        let Some(label) = RunLabel::of(message) else { continue };
        let (seal, records) = opened.entry(label.clone()).or_insert_with(|| {
            let seal = RunSeal::new(kit.secret(), label);
            (seal, BTreeMap::new())
        });
        for part in &message.parts {
            let known = records.entry(part.seq).or_default();
            if !known.contains_key(&part.part)
                && let Some(plaintext) = seal.open(part)
            {
                known.insert(part.part, (part.last, plaintext));
            }
        }
    }
    let whole = |parts: Parts| -> Option<Bytes> {
        let ends = parts.values().next_back().is_some_and(|(last, _)| *last);
        let complete = ends && parts.keys().copied().eq(0..parts.len() as u32);
        let body = || parts.into_values().flat_map(|(_, plaintext)| plaintext).collect::<Vec<u8>>();
        complete.then(|| body().into())
    };
    let mut runs = Runs::new();
    for (label, (_, records)) in opened {
        let records = records.into_iter().filter_map(|(seq, parts)| Some((seq, whole(parts)?)));
        let records: BTreeMap<u64, Bytes> = records.collect();
        if !records.is_empty() {
            runs.insert(label, records);
        }
    }
    runs
}
