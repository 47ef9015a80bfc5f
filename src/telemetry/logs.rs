//! Logs: structured, to standard error. No log line holds the value of a key.

use clap::ValueEnum;
use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, Layer, filter::ParseError, fmt, registry::LookupSpan};

use super::traces;

/// The format of the logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Plain text.
    Text,
}

/// A filter that can't be parsed.
#[derive(Debug, thiserror::Error)]
#[error("--log: {filter:?} is not a filter: {source}; use a level such as info")]
pub struct FilterError {
    filter: String,
    source: ParseError,
}

/// The layer that writes the logs.
///
/// # Errors
/// If the filter can't be parsed.
pub(super) fn layer<S>(format: LogFormat, filter: &str) -> Result<Box<dyn Layer<S> + Send + Sync>, FilterError>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let parsed = EnvFilter::try_new(filter).map_err(|source| FilterError { filter: filter.to_owned(), source })?;
    // The client logs responses that it can't parse, and responses about Secrets hold values. The caller of the client
    // logs these errors without the response. Spans go to the exporter of traces alone.
    let off = ["kube_client::client=off".to_owned(), format!("{}=off", traces::TARGET)];
    let parsed = off.iter().filter_map(|directive| directive.parse().ok()).fold(parsed, EnvFilter::add_directive);
    let layer = fmt::layer().with_writer(std::io::stderr);
    Ok(match format {
        LogFormat::Json => {
            layer.json().flatten_event(true).with_current_span(false).with_span_list(false).with_filter(parsed).boxed()
        }
        LogFormat::Text => layer.with_filter(parsed).boxed(),
    })
}
