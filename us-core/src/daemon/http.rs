//! `/metrics` (Prometheus) and `/healthz` of every daemon, in plain HTTP on an address of its own.
//!
//! Names of metrics start with `us_` and are listed in docs/metrics.md. The recorder belongs to the
//! process: whoever asks first installs it.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

use super::shutdown::Shutdown;

/// How often idle histogram samples are folded, so that an unscraped daemon does not grow.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Says whether the daemon can do its work: `Err` says, for people, why not. Called for every
/// request to `/healthz`; must not block.
pub type HealthCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The process's metrics. The first call installs the recorder; before it, metrics go nowhere.
///
/// # Panics
/// When another library has installed a recorder of its own.
pub fn metrics_handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        PrometheusBuilder::new()
            .install_recorder()
            .expect("nobody but this function installs a recorder")
    })
}

/// The two routes, to be merged with a daemon's own (the directory's dashboard).
pub fn router(health: HealthCheck) -> Router {
    let handle = metrics_handle();
    let metrics = move || async move {
        record_process();
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render())
    };
    let healthz = move || {
        let answer = health();
        async move {
            match answer {
                Ok(()) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
                Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
            }
        }
    };
    Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz))
}

/// Serves `router` on `address` until the shutdown, as tasks of `shutdown`. Returns the address
/// bound (port 0 takes any).
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    router: Router,
    shutdown: &Shutdown,
) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let ended = shutdown.token().clone().cancelled_owned();
    shutdown.tasks().spawn(async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(ended).await {
            tracing::error!(%error, "the metrics server ended");
        }
    });
    let token = shutdown.token().clone();
    shutdown.tasks().spawn(async move {
        // Cancel-safe: the sleep has no state worth keeping, and a dropped upkeep is done later.
        while token.run_until_cancelled(tokio::time::sleep(UPKEEP_EVERY)).await.is_some() {
            metrics_handle().run_upkeep();
        }
    });
    Ok(bound)
}

fn record_process() {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let resident = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    if let Some(kib) = resident {
        metrics::gauge!("process_resident_memory_bytes").set((kib << 10) as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: us\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_and_metrics_are_served_until_the_end() {
        let well = Arc::new(AtomicBool::new(true));
        let health: HealthCheck = Arc::new({
            let well = Arc::clone(&well);
            move || if well.load(Ordering::Relaxed) { Ok(()) } else { Err("disk full".into()) }
        });
        let shutdown = Shutdown::new();
        let address =
            serve(SocketAddr::from(([127, 0, 0, 1], 0)), router(health), &shutdown).await.unwrap();
        metrics::counter!("us_test_total").increment(3);
        assert!(fetch(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let metrics = fetch(address, "/metrics").await;
        assert!(metrics.contains("us_test_total 3"), "{metrics}");
        assert!(metrics.contains("process_resident_memory_bytes"), "{metrics}");
        well.store(false, Ordering::Relaxed);
        let sick = fetch(address, "/healthz").await;
        assert!(sick.starts_with("HTTP/1.1 503") && sick.contains("disk full"), "{sick}");
        shutdown.request();
        shutdown.drain("http", Duration::from_secs(5)).await.unwrap();
    }
}
