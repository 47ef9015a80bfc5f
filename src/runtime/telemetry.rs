//! Logs: structured, to standard error, without any value.

use tracing_subscriber::{EnvFilter, fmt};

use super::args::LogFormat;

/// Starts logging.
///
/// # Errors
/// If the filter can't be read.
pub fn start(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| format!("--log: {filter:?} is no filter: {error}; write a level such as info"))?;
    // The client logs a whole answer that it can't read, and answers about Secrets hold values. What went wrong is
    // logged where the request was made.
    let filter = match "kube_client::client=off".parse() {
        Ok(directive) => filter.add_directive(directive),
        Err(_) => filter,
    };
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        LogFormat::Text => builder.init(),
    }
    Ok(())
}
