//! `policy`: translates access policies from and to the JSON of Coralogix.

use std::io::Read;

use clap::{Args, Subcommand};
use kube::Api;

use super::{CliError, ClusterClient, Global, Reply, Result, key_type, print, refused, rights};
use crate::{
    api::{AccessPolicy, KeyType},
    domain::{coralogix, rights as domain_rights},
};

#[derive(Subcommand)]
pub(super) enum PolicyCommand {
    /// Write the AccessPolicy that is equivalent to a policy of Coralogix to standard output.
    Import(ImportArgs),
    /// Write an AccessPolicy as the JSON of Coralogix to standard output. Needs the right to read policies.
    Export(ExportArgs),
}

#[derive(Args)]
pub(super) struct ImportArgs {
    /// The file with the JSON; - is standard input.
    file: String,
    /// The name of the AccessPolicy.
    #[arg(long)]
    name: String,
}

#[derive(Args)]
pub(super) struct ExportArgs {
    /// The name of the AccessPolicy.
    name: String,
    /// The type of the keys that refer to it: Team or SendYourData.
    #[arg(long = "type", value_parser = key_type, default_value = "Team")]
    key_type: KeyType,
}

/// Reads a file; `-` is standard input.
pub(super) fn read(file: &str) -> Result<String> {
    let text = if file == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    text.map_err(|error| CliError::Refused(format!("{file}: {error}")))
}

pub(super) fn import(args: &ImportArgs, global: &Global) -> Result<Reply> {
    let spec = match coralogix::import(&read(&args.file)?) {
        Ok(spec) => spec,
        Err(error) => return refused(format!("{}: {error}", args.file)),
    };
    let mut policy = AccessPolicy::new(&args.name, spec);
    policy.metadata.namespace.clone_from(&global.namespace);
    Ok(Reply::yes(print::yaml(&policy)?))
}

pub(super) async fn export(cluster: &ClusterClient, args: &ExportArgs) -> Result<Reply> {
    let need = domain_rights::any_permission(domain_rights::read_policy(args.key_type));
    if !rights::may(cluster, &need).await? {
        let names = domain_rights::read_policy(args.key_type).join(", ");
        return refused(format!("to read access policies, you need one of these permissions: {names}"));
    }
    let policies: Api<AccessPolicy> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let policy = policies.get(&args.name).await?;
    match coralogix::export(&policy.spec, args.key_type) {
        Ok(json) => Ok(Reply::yes(print::json(&json)?)),
        Err(error) => refused(format!("AccessPolicy {}: {error}", args.name)),
    }
}
