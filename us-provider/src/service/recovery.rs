//! What a directory that has lost its disk reads back: the root and the records kept here.

use std::path::{Path, PathBuf};

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use us_proto::v1::recovery_page::Content;
use us_proto::v1::recovery_server::Recovery;
use us_proto::v1::{KeptRoot, ReadRecoveryRequest, RecoveryPage};

use super::{administers, allow};
use crate::copies::Reading;
use crate::membership::MembershipFiles;

/// Pages that wait for the reader.
const PAGES_MAX: usize = 4;

/// Gives back what is kept in a data folder.
#[derive(Clone, Debug)]
pub struct RecoveryService {
    data: PathBuf,
}

type Pages = tokio::sync::mpsc::Sender<Result<RecoveryPage, Status>>;

impl RecoveryService {
    /// Of this data folder.
    pub fn new(data: &Path) -> Self {
        Self { data: data.to_owned() }
    }

    /// Sends everything; stops when the reader is gone.
    fn send_all(&self, pages: &Pages) -> Result<(), Status> {
        let failed = |error: &dyn std::error::Error| Status::unavailable(error.to_string());
        let files = MembershipFiles::new(&self.data);
        // A damaged membership or root must not hide the records.
        let joined = files.load_joined().unwrap_or_else(|error| {
            tracing::error!(%error, "whose provider this is cannot be said");
            None
        });
        let root = files.load_root().unwrap_or_else(|error| {
            tracing::error!(%error, "the directory's root cannot be given back");
            None
        });
        let (sequence, root) = root.unwrap_or_default();
        let cluster = joined.map(|joined| joined.cluster).unwrap_or_default();
        let root = Content::Root(KeptRoot { sequence, root, cluster });
        let send =
            |content| pages.blocking_send(Ok(RecoveryPage { content: Some(content) })).is_ok();
        if !send(root) {
            return Ok(());
        }
        let mut reading = Reading::new(&self.data).map_err(|error| failed(&error))?;
        while let Some(records) = reading.next_message().map_err(|error| failed(&error))? {
            if !send(Content::Records(records)) {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Recovery for RecoveryService {
    type ReadStream = BoxStream<'static, Result<RecoveryPage, Status>>;

    async fn read(
        &self,
        request: Request<ReadRecoveryRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        allow(&request, administers)?;
        let (pages, stream) = tokio::sync::mpsc::channel(PAGES_MAX);
        let service = self.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(status) = service.send_all(&pages) {
                let _gone = pages.blocking_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }
}
