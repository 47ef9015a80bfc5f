//! The binary of the plugin, `kubectl keywright`. The implementation is [`keywright::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    keywright::cli::main()
}
