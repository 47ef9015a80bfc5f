//! Logs, traces and metrics of the process.

pub mod histogram;
pub mod logs;
pub mod metrics;
pub mod rate_limit;
pub mod traces;

use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

use self::{
    logs::{FilterError, LogFormat},
    traces::{OtlpError, SpanExport},
};

/// The flags of logs and traces, which all long-running commands have.
#[derive(Clone, Debug, clap::Args)]
pub struct TelemetryArgs {
    /// The format of the logs.
    #[arg(long, env = "KEYWRIGHT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// The filter of the logs: a level, or directives such as info,keywright=debug.
    #[arg(long, env = "KEYWRIGHT_LOG", default_value = "info")]
    pub log: String,

    /// Export spans of reconciliations, admission requests and checks to this endpoint, over OTLP/gRPC without TLS,
    /// such as `http://collector.observability:4317`. Absent: no spans are created. OTEL_TRACES_SAMPLER and
    /// OTEL_RESOURCE_ATTRIBUTES have their standard meaning.
    #[arg(long, env = "KEYWRIGHT_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

/// An invalid flag of logs or traces.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter can't be parsed.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The endpoint of the spans can't be used.
    #[error(transparent)]
    Otlp(#[from] OtlpError),
}

/// Logs and traces of the process.
#[derive(Debug)]
#[must_use = "the last spans are lost without stop"]
pub struct Telemetry {
    exporter: Option<SpanExport>,
}

impl Telemetry {
    /// Installs the subscriber of the process. `service` is the name of the service in traces. Must be called once,
    /// inside a Tokio runtime.
    ///
    /// # Errors
    /// If a flag can't be used.
    pub fn start(args: &TelemetryArgs, service: &'static str) -> Result<Self, TelemetryError> {
        let exporter = args.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty());
        let exporter = exporter.map(|endpoint| SpanExport::start(endpoint, service)).transpose()?;
        let spans = exporter.as_ref().map(|exporter| {
            let only_spans = Targets::new().with_target(traces::TARGET, tracing::Level::INFO);
            tracing_opentelemetry::layer().with_tracer(exporter.tracer()).with_filter(only_spans)
        });
        tracing_subscriber::registry().with(logs::layer(args.log_format, &args.log)?).with(spans).init();
        Ok(Self { exporter })
    }

    /// Exports the remaining spans.
    pub fn stop(self) {
        if let Some(exporter) = self.exporter {
            exporter.stop();
        }
    }
}
