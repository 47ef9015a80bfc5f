//! The plugin's binary, `kubectl keywright`; see [`keywright::cli`] for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    keywright::cli::main()
}
