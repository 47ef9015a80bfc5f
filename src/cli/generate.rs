//! Completion scripts and manual pages.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::{Cli, CliError, Reply, Result};

#[derive(Args)]
pub(super) struct CompletionArgs {
    /// The shell.
    shell: clap_complete::Shell,
}

#[derive(Args)]
pub(super) struct ManArgs {
    /// The directory, which must exist.
    directory: PathBuf,
}

pub(super) fn completion(args: &CompletionArgs) -> Result<Reply> {
    let mut script = vec![];
    // Shells look up a completion by the name of the binary.
    let mut command = Cli::command().bin_name("kubectl-keywright");
    clap_complete::generate(args.shell, &mut command, "kubectl-keywright", &mut script);
    String::from_utf8(script).map(Reply::yes).map_err(|error| CliError::Refused(error.to_string()))
}

pub(super) fn man(args: &ManArgs) -> Result<Reply> {
    let failed = |error: std::io::Error| CliError::Refused(format!("{}: {error}", args.directory.display()));
    clap_mangen::generate_to(Cli::command(), &args.directory).map_err(failed)?;
    Ok(Reply::yes(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_definitions_are_valid() {
        Cli::command().debug_assert();
    }
}
