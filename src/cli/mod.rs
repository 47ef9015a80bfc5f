//! `kubectl keywright`: what people do with keys, with their own rights and nobody else's.
//!
//! It talks to the API server as kubectl does, and needs no access to the operator. Values come from KeyReveals alone;
//! `accept` reads a Secret for its digest. One file a group of commands; what they decide by is [`crate::domain`].
//!
//! Names, users, messages and whatever else comes from the cluster is shown through `print::line` or `print::table`:
//! it may have been written by somebody who wants it to look like something else.

mod accept;
mod change;
mod generate;
mod identify;
mod migrate;
mod policy;
mod print;
mod reveal;
mod rights;
mod show;

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use kube::{
    Api, Client, Config, ResourceExt,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{
    api::{ApiKey, KeyType, PermissionCatalog},
    domain::catalog::Catalog,
    runtime::clock::Clock,
};

/// The name under which the plugin's writes are in `metadata.managedFields`.
const FIELD_MANAGER: &str = "kubectl-keywright";

/// What a command has to say, and whether the answer is yes.
struct Reply {
    text: String,
    yes: bool,
}

impl Reply {
    fn yes(text: impl Into<String>) -> Self {
        Self { text: text.into(), yes: true }
    }

    fn no(text: impl Into<String>) -> Self {
        Self { text: text.into(), yes: false }
    }
}

/// Why a command could not be carried out.
#[derive(Debug)]
enum Failure {
    /// Denied, not found, out of reach: exit code 1.
    Refused(String),
    /// Asked for in a way that makes no sense: exit code 2.
    Usage(String),
}

type Result<T, E = Failure> = std::result::Result<T, E>;

fn refused<T>(message: impl Into<String>) -> Result<T> {
    Err(Failure::Refused(message.into()))
}

fn usage<T>(message: impl Into<String>) -> Result<T> {
    Err(Failure::Usage(message.into()))
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused(status.message),
            other => Self::Refused(format!("the cluster could not be asked: {other}")),
        }
    }
}

/// API keys as Kubernetes resources.
///
/// Everything is done with your own rights. Exit codes: 0 done or yes, 1 no, denied or not found, 2 wrong usage.
#[derive(Parser)]
#[command(name = "kubectl-keywright", bin_name = "kubectl keywright", version, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Clone, Default)]
struct Global {
    /// The namespace; otherwise that of the context.
    #[arg(short, long, global = true)]
    namespace: Option<String>,

    /// The context of the kubeconfig.
    #[arg(long, global = true)]
    context: Option<String>,

    /// The kubeconfig; otherwise as kubectl finds it.
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,

    /// The user to act as.
    #[arg(long = "as", global = true, value_name = "USER")]
    as_user: Option<String>,

    /// A group to act as; may be repeated.
    #[arg(long = "as-group", global = true, value_name = "GROUP", requires = "as_user")]
    as_groups: Vec<String>,

    /// No colours, if this is anything but empty.
    #[arg(long, env = "NO_COLOR", global = true, hide = true, default_value = "", hide_default_value = true)]
    no_color: String,
}

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Only the names.
    Name,
    /// The table with more columns.
    Wide,
}

/// Which keys.
#[derive(Args, Clone, Default)]
struct Selection {
    /// In all namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,

    /// By label, as kubectl has it.
    #[arg(short = 'l', long)]
    selector: Option<String>,
}

/// Whether to only say what would be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DryRun {
    /// Do it.
    #[default]
    None,
    /// Only say it.
    Client,
    /// Let the API server check it, and change nothing.
    Server,
}

#[derive(Subcommand)]
enum Command {
    /// List keys.
    #[command(visible_alias = "ls")]
    List(show::ListArgs),
    /// Show all about a key: what it may do, its values' ids, its policy, and what to do if something is wrong.
    Describe(show::DescribeArgs),
    /// See the value of a key.
    Reveal(reveal::RevealArgs),
    /// Replace the value of a key by a new one.
    Rotate(change::RotateArgs),
    /// Let keys be used again, with the same value.
    Activate(change::SwitchArgs),
    /// Refuse keys until they are activated again.
    Deactivate(change::SwitchArgs),
    /// Delete keys: their values are refused for good.
    Delete(change::DeleteArgs),
    /// Deactivate all keys that match, wherever they are: for when something leaked.
    Revoke(change::RevokeArgs),
    /// Say whether you may do something, and by which binding.
    CanI(rights::CanIArgs),
    /// Say whether a user may view, manage and delete a key, and which gate, rule and binding decides.
    Explain(rights::ExplainArgs),
    /// Say which key a value belongs to. The value is read from standard input.
    Identify(identify::IdentifyArgs),
    /// Accept the value in a Secret that the operator can't authenticate, such as one from a backup. Needs the right to
    /// restore keys.
    Accept(accept::AcceptArgs),
    /// Look at legacy keys.
    #[command(subcommand)]
    Legacy(show::LegacyCommand),
    /// Write the manifests that replace legacy keys, or ApiKeys of Coralogix's own operator, to standard output.
    Migrate(migrate::MigrateArgs),
    /// Translate access policies from and to the JSON of Coralogix.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Write a completion script to standard output.
    Completion(generate::CompletionArgs),
    /// Write manual pages into a directory.
    Man(generate::ManArgs),
}

/// Runs the plugin with the arguments of the process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return ExitCode::FAILURE;
    };
    let (text, code) = match runtime.block_on(run(cli)) {
        Ok(Reply { text, yes: true }) => (text, ExitCode::SUCCESS),
        Ok(Reply { text, yes: false }) => (text, ExitCode::FAILURE),
        Err(failure) => {
            let (message, code) = match failure {
                Failure::Refused(message) => (message, ExitCode::FAILURE),
                Failure::Usage(message) => (message, ExitCode::from(2)),
            };
            say(&format!("error: {}", print::line(&message)));
            return code;
        }
    };
    // Whoever closed the pipe has seen enough.
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    code
}

/// Tells the person at the terminal; what others read goes to standard output.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

async fn run(cli: Cli) -> Result<Reply> {
    // What needs no cluster must work without one.
    let cluster = match cli.command {
        Command::Completion(args) => return generate::completion(&args),
        Command::Man(args) => return generate::man(&args),
        Command::Policy(policy::PolicyCommand::Import(args)) => return policy::import(&args, &cli.global),
        Command::Identify(args) => {
            let value = identify::read(&args)?;
            return identify::identify(&Cluster::connect(cli.global).await?, &value).await;
        }
        command => (Cluster::connect(cli.global).await?, command),
    };
    let (cluster, command) = cluster;
    match command {
        Command::List(args) => show::list(&cluster, &args, false).await,
        Command::Describe(args) => show::describe(&cluster, &args, false).await,
        Command::Legacy(show::LegacyCommand::List(args)) => show::list(&cluster, &args, true).await,
        Command::Legacy(show::LegacyCommand::Describe(args)) => show::describe(&cluster, &args, true).await,
        Command::Reveal(args) => reveal::reveal(&cluster, &args).await,
        Command::Rotate(args) => change::rotate(&cluster, &args).await,
        Command::Activate(args) => change::switch(&cluster, &args, true).await,
        Command::Deactivate(args) => change::switch(&cluster, &args, false).await,
        Command::Delete(args) => change::delete(&cluster, &args).await,
        Command::Revoke(args) => change::revoke(&cluster, &args).await,
        Command::CanI(args) => rights::can_i(&cluster, &args).await,
        Command::Explain(args) => rights::explain(&cluster, &args).await,
        Command::Accept(args) => accept::accept(&cluster, &args).await,
        Command::Migrate(args) => migrate::migrate(&cluster, &args).await,
        Command::Policy(policy::PolicyCommand::Export(args)) => policy::export(&cluster, &args).await,
        Command::Completion(_) | Command::Man(_) | Command::Identify(_) | Command::Policy(_) => Ok(Reply::yes("")),
    }
}

/// The cluster, as the person who asks sees it.
struct Cluster {
    client: Client,
    namespace: String,
    global: Global,
    clock: Clock,
    colour: bool,
}

impl Cluster {
    async fn connect(global: Global) -> Result<Self> {
        let options = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
        let broken = |error: &dyn std::fmt::Display| Failure::Refused(format!("the kubeconfig can't be used: {error}"));
        let mut config = match &global.kubeconfig {
            Some(file) => {
                let kubeconfig = Kubeconfig::read_from(file).map_err(|error| broken(&error))?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| broken(&error))?
            }
            None if options.context.is_some() => {
                Config::from_kubeconfig(&options).await.map_err(|error| broken(&error))?
            }
            None => Config::infer().await.map_err(|error| broken(&error))?,
        };
        if let Some(user) = &global.as_user {
            config.auth_info.impersonate = Some(user.clone());
            config.auth_info.impersonate_groups = (!global.as_groups.is_empty()).then(|| global.as_groups.clone());
        }
        let namespace = global.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| broken(&error))?;
        let colour = global.no_color.is_empty() && std::io::stdout().is_terminal();
        Ok(Self { client, namespace, global, clock: Clock::system(), colour })
    }

    fn keys(&self) -> Api<ApiKey> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn keys_in(&self, namespace: &str) -> Api<ApiKey> {
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn key(&self, name: &str) -> Result<ApiKey> {
        Ok(self.keys().get(name).await?)
    }

    async fn select(&self, selection: &Selection, fields: Option<&str>) -> Result<Vec<ApiKey>> {
        const PAGE: u32 = 500;
        let api = if selection.all_namespaces { Api::all(self.client.clone()) } else { self.keys() };
        let mut params = ListParams::default().limit(PAGE);
        params.label_selector.clone_from(&selection.selector);
        params.field_selector = fields.map(str::to_owned);
        let mut keys = vec![];
        loop {
            let page = api.list(&params).await?;
            keys.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok(keys),
            }
        }
    }

    /// The catalogues, oldest first, and what they come to.
    async fn catalog(&self) -> Result<(Vec<PermissionCatalog>, Catalog)> {
        let all: Api<PermissionCatalog> = Api::all(self.client.clone());
        let mut sources = all.list(&ListParams::default()).await?.items;
        sources.sort_by_key(|source| (source.creation_timestamp().map(|t| t.0), source.name_any()));
        let specs: Vec<_> = sources.iter().map(|source| (source.name_any(), &source.spec)).collect();
        let (catalog, _) = Catalog::merge(specs.iter().map(|(name, spec)| (name.as_str(), *spec)));
        Ok((sources, catalog))
    }
}

fn key_type(text: &str) -> Result<KeyType, String> {
    match text.to_ascii_lowercase().as_str() {
        "personal" => Ok(KeyType::Personal),
        "sendyourdata" => Ok(KeyType::SendYourData),
        "team" => Ok(KeyType::Team),
        _ => Err("the types are Personal, SendYourData and Team".to_owned()),
    }
}
