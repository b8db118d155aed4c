//! `usctl invite`, `members`, `revoke`, and joining of people's programs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use comfy_table::Table;
use serde_json::{Value, json};
use tonic::transport::Channel;
use us_core::daemon::joined::{machine_name, read_code};
use us_core::daemon::size::human_duration;
use us_core::tls::{Identity, InviteCode, KeyHash, Role};
use us_core::wire::join::join as wire_join;
use us_proto::v1;
use us_proto::v1::registry_client::RegistryClient;
use zeroize::Zeroizing;

use super::act::utc_time;
use super::connect::{answer, dialled};
use super::{JsonArgs, Senseless, Target, print};
use crate::places;

/// Flags of `usctl invite`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct InviteArgs {
    #[command(subcommand)]
    command: Option<InviteCommand>,
    /// What newcomers become: provider, client or admin
    #[arg(long, value_name = "ROLE", required = true)]
    role: Option<Role>,
    /// The site that newcomers are at, for example campus/building
    #[arg(long, value_name = "PATH", default_value = "")]
    site: String,
    /// What the newcomer is called [default: its host name]
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,
    /// How many may join with it
    #[arg(long, value_name = "N", default_value_t = 1)]
    uses: u32,
    /// How long it is good, for example 30m, 24h or 7d; the time that the directory runs counts
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = time_span)]
    expires: Duration,
    /// Where newcomers find the directory [default: where this command finds it]
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    #[command(flatten)]
    json: JsonArgs,
}

#[derive(Debug, clap::Subcommand)]
enum InviteCommand {
    /// The invitations that are open
    List(JsonArgs),
    /// Take an invitation back
    Cancel {
        /// Its id, or the beginning of it
        id: String,
    },
}

/// Flags of `usctl revoke`.
#[derive(Debug, clap::Args)]
pub struct RevokeArgs {
    /// Its name, or the beginning of its key (`usctl members`)
    member: String,
    /// Do it
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    json: JsonArgs,
}

/// Flags of `usfs join` and `usctl join`.
#[derive(Debug, clap::Args)]
pub struct JoinArgs {
    /// The code that `usctl invite` printed; without it, or with -, it is read from standard input
    #[arg(value_name = "CODE")]
    code: Option<String>,
    /// What this machine is called, where the invitation does not say [default: its host name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// "90s", "30m", "24h" or "7d".
fn time_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write 30m, 24h or 7d");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(wrong()),
    };
    let count: u64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    let seconds = count.checked_mul(seconds).filter(|seconds| *seconds > 0).ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

async fn registry(target: &Target) -> anyhow::Result<(RegistryClient<Channel>, String, Identity)> {
    let (channel, directory, identity) = dialled(target).await?;
    Ok((RegistryClient::new(channel), directory, identity))
}

pub(super) async fn invite(target: &Target, args: &InviteArgs) -> anyhow::Result<()> {
    match &args.command {
        None => {}
        Some(InviteCommand::List(json)) => return invites(target, *json).await,
        Some(InviteCommand::Cancel { id }) => return cancel(target, id).await,
    }
    let Some(role) = args.role else { bail!("give --role provider, client or admin") };
    let (mut client, directory, identity) = registry(target).await?;
    let expires_ms = args.expires.as_millis() as u64;
    let request = v1::InviteRequest {
        role: role.as_str().to_owned(),
        site: args.site.clone(),
        name: args.name.clone(),
        uses: args.uses,
        expires_ms,
    };
    let reply = answer(client.invite(request)).await?;
    let secret = Zeroizing::new(reply.secret.to_vec());
    let secret = secret[..].try_into().context("the directory's secret has another length")?;
    let address = args.address.clone().unwrap_or(directory);
    let code = InviteCode { secret: Zeroizing::new(secret), pin: identity.pin()?, address };
    // What is printed must be readable again.
    let text = code.reveal();
    text.parse::<InviteCode>().with_context(|| format!("{} as an address", code.address))?;
    if is_local(&code.address) {
        eprintln!(
            "usctl: {} can be reached from this machine only: give --address HOST:PORT to invite \
             others",
            code.address
        );
    }
    let info = reply.invite.unwrap_or_default();
    let value = json!({
        "code": text.as_str(),
        "command": format!("{} {}", join_command(role), text.as_str()),
        "invite": invite_json(&info),
    });
    print(args.json, &value, || {
        let uses = if args.uses == 1 { "once".to_owned() } else { format!("{} times", args.uses) };
        format!(
            "{}\n\nGood {uses}, for {}. On the new machine:\n  {} CODE\n\
             (or without CODE: it is asked for then, and stays out of the shell's history)\n",
            text.as_str(),
            human_duration(args.expires),
            join_command(role),
        )
    })
}

fn is_local(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let ip = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback() || ip.is_unspecified())
}

const fn join_command(role: Role) -> &'static str {
    match role {
        Role::Provider => "us-provider join",
        Role::Client | Role::Directory => "usfs join",
        Role::Admin => "usctl join",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn invite_json(invite: &v1::InviteInfo) -> Value {
    json!({
        "id": hex(&invite.id),
        "role": invite.role,
        "site": invite.site,
        "name": invite.name,
        "uses_left": invite.uses_left,
        "expires_in_s": invite.expires_in_ms / 1000,
        "by": invite.by,
    })
}

async fn invites(target: &Target, json: JsonArgs) -> anyhow::Result<()> {
    let (mut client, ..) = registry(target).await?;
    let invites = answer(client.invites(v1::InvitesRequest {})).await?.invites;
    let value = invites.iter().map(invite_json).collect();
    print(json, &Value::Array(value), || {
        if invites.is_empty() {
            return "no invitation is open\n".to_owned();
        }
        let mut table =
            plain_table(["ID", "ROLE", "NAME", "SITE", "USES LEFT", "EXPIRES IN", "BY"]);
        for one in &invites {
            let left = human_duration(Duration::from_millis(one.expires_in_ms));
            table.add_row([
                hex(&one.id),
                one.role.clone(),
                one.name.clone(),
                one.site.clone(),
                one.uses_left.to_string(),
                left,
                one.by.clone(),
            ]);
        }
        format!("{table}\n")
    })
}

fn plain_table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_header(header);
    table
}

async fn cancel(target: &Target, id: &str) -> anyhow::Result<()> {
    let digits = id.len() >= 2 && id.len().is_multiple_of(2) && id.is_ascii();
    let byte = |at: usize| u8::from_str_radix(&id[at..at + 2], 16).ok();
    let bytes: Option<Vec<u8>> =
        if digits { (0..id.len()).step_by(2).map(byte).collect() } else { None };
    let Some(bytes) = bytes else {
        let detail = anyhow::anyhow!("{id:?} is no id of an invitation: see `usctl invite list`");
        return Err(Senseless(detail).into());
    };
    let (mut client, ..) = registry(target).await?;
    answer(client.cancel_invite(v1::CancelInviteRequest { id: bytes.into() })).await?;
    super::say("the invitation is cancelled")
}

fn standing(member: &v1::MemberInfo) -> &'static str {
    match member.standing() {
        v1::Standing::Good => "good",
        v1::Standing::Expired => "expired",
        v1::Standing::Revoked => "revoked",
        v1::Standing::Unspecified => "unknown",
    }
}

fn member_json(member: &v1::MemberInfo) -> Value {
    json!({
        "key": hex(&member.key_hash),
        "role": member.role,
        "name": member.name,
        "site": member.site,
        "standing": standing(member),
        "joined_unix_ms": member.joined_unix_ms,
        "expires_in_s": member.expires_in_ms / 1000,
        "revoked_unix_ms": member.revoked_unix_ms,
        "by": member.by,
    })
}

/// `usctl members`.
pub(super) async fn members(target: &Target, json: JsonArgs) -> anyhow::Result<()> {
    let (mut client, ..) = registry(target).await?;
    let mut members: Vec<v1::MemberInfo> = Vec::new();
    loop {
        let after = members.last().map(|member| member.key_hash.clone()).unwrap_or_default();
        let page = answer(client.members(v1::MembersRequest { after })).await?.members;
        if page.is_empty() {
            break;
        }
        members.extend(page);
    }
    members.sort_by(|one, other| (&one.role, &one.name).cmp(&(&other.role, &other.name)));
    let value = members.iter().map(member_json).collect();
    print(json, &Value::Array(value), || {
        let mut table = plain_table(["NAME", "ROLE", "KEY", "STANDING", "SITE", "JOINED", "BY"]);
        for one in &members {
            let key = hex(&one.key_hash[..8.min(one.key_hash.len())]);
            table.add_row([
                one.name.clone(),
                one.role.clone(),
                key,
                standing(one).to_owned(),
                one.site.clone(),
                utc_time(one.joined_unix_ms),
                one.by.clone(),
            ]);
        }
        format!("{table}\n")
    })
}

/// `usctl revoke`.
pub(super) async fn revoke(target: &Target, args: &RevokeArgs) -> anyhow::Result<()> {
    if !args.yes {
        let detail = anyhow::anyhow!(
            "revoking {:?} shuts it out at once and for ever; what a provider holds counts as lost \
             and is made again elsewhere (to keep its copies until then, drain it first). Say --yes \
             to do it",
            args.member
        );
        return Err(Senseless(detail).into());
    }
    let (mut client, ..) = registry(target).await?;
    let reply = answer(client.revoke(v1::RevokeRequest { member: args.member.clone() })).await?;
    let member = reply.member.unwrap_or_default();
    let value = json!({
        "member": member_json(&member),
        "sessions": reply.sessions,
        "provider": reply.provider,
        "fragments": reply.fragments,
    });
    print(args.json, &value, || {
        let key =
            KeyHash::from_slice(&member.key_hash).map(|key| format!("{:.16}", key.to_string()));
        let mut text =
            format!("{} {} ({}) is revoked\n", member.role, member.name, key.unwrap_or_default());
        if reply.sessions > 0 {
            let _ = writeln!(text, "{} of its mounts ended", reply.sessions);
        }
        if reply.provider > 0 {
            let _ = writeln!(
                text,
                "provider {}: {} fragments are made again elsewhere",
                reply.provider, reply.fragments
            );
        }
        text
    })
}

/// Joins as `role`; everything lies in the identity's folder afterwards.
///
/// # Errors
/// Why it did not work, for people.
pub async fn join(role: Role, dir: Option<PathBuf>, args: &JoinArgs) -> anyhow::Result<String> {
    let given = args.code.clone();
    let code = tokio::task::spawn_blocking(move || read_code(given.as_deref())).await??;
    let dir = dir.unwrap_or_else(|| places::joined_dir(role));
    let name = args.name.clone().unwrap_or_else(machine_name);
    let identity = wire_join(&code, role, &name, &dir).await?;
    Ok(joined_text(&code, &identity, &dir))
}

fn joined_text(code: &InviteCode, identity: &Identity, dir: &Path) -> String {
    let next = match identity.own().role {
        Role::Admin => "usctl status".to_owned(),
        _ => format!("usfs mount {}/VOLUME MOUNTPOINT", code.address),
    };
    let (address, own, dir) = (&code.address, identity.own(), dir.display());
    format!("joined {address} as {own}\nkey and certificate are in {dir}; next: {next}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(time_span("30m"), Ok(Duration::from_secs(1800)));
        assert_eq!(time_span("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for wrong in
            ["", "h", "0h", "5", "-1h", "1y", "99999999999999999999h", "18446744073709551615d"]
        {
            assert!(time_span(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_local_address_is_told() {
        assert!(is_local("127.0.0.1:7460") && is_local("[::1]:1") && is_local("localhost:1"));
        assert!(!is_local("us.example:7460") && !is_local("192.0.2.1:7460"));
    }
}
