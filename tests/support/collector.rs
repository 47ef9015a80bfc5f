//! A real OpenTelemetry Collector, which receives spans over OTLP/gRPC and writes them to its log.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;

use super::process::Process;
use super::{ControlPlane, free_port, serial, tools};

/// A running collector.
pub struct Collector {
    process: Process,
    address: SocketAddr,
}

impl Collector {
    /// Starts a collector on a free port of the loopback interface.
    pub async fn start(plane: &ControlPlane) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let config = format!(
            "receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '{address}'}}}}}}}}
exporters: {{debug: {{verbosity: detailed}}}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}
"
        );
        let file = plane.folder().join(format!("otelcol-{}.yaml", serial()));
        std::fs::write(&file, config)?;
        let arguments = [format!("--config={}", file.display())];
        let process = Process::start(plane, &tools::find("otelcol", "otelcol")?, plane.folder(), &arguments, &[])?;
        process.wait_for(address).await?;
        Ok(Self { process, address })
    }

    /// The value of `--otlp-endpoint`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The text of each span that it received, with its attributes.
    pub fn spans(&self) -> Vec<String> {
        let log = self.process.log();
        log.split("\nSpan #")
            .skip(1)
            .map(|span| span.split("\nResourceSpans").next().unwrap_or(span).to_owned())
            .collect()
    }

    /// All that it wrote.
    pub fn log(&self) -> String {
        self.process.log()
    }
}
