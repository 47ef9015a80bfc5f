//! The plugin `kubectl keywright`, which manages keys with the rights of its user.
//!
//! The plugin talks to the API server as kubectl does and needs no access to the operator. Values come from KeyReveals
//! only; `accept` reads a Secret for its digest. Each group of commands has its own file and uses the rules of
//! [`crate::domain`].
//!
//! Names, users, messages and all other text from the cluster are printed through `print::line` or `print::table`,
//! because other users may have written text that imitates other output.

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
    clock::Clock,
    domain::catalog::Catalog,
};

/// The field manager of the plugin's writes in `metadata.managedFields`.
const FIELD_MANAGER: &str = "kubectl-keywright";

/// The output of a command, and whether its answer is yes.
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

/// The reason why a command failed.
#[derive(Debug)]
enum CliError {
    /// The request was denied or failed, or an object was not found: exit code 1.
    Refused(String),
    /// The arguments are wrong: exit code 2.
    Usage(String),
}

type Result<T, E = CliError> = std::result::Result<T, E>;

fn refused<T>(message: impl Into<String>) -> Result<T> {
    Err(CliError::Refused(message.into()))
}

fn usage<T>(message: impl Into<String>) -> Result<T> {
    Err(CliError::Usage(message.into()))
}

impl From<kube::Error> for CliError {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused(status.message),
            other => Self::Refused(format!("the request to the API server failed: {other}")),
        }
    }
}

/// Manage API keys that are Kubernetes resources.
///
/// All commands use your own rights. Exit codes: 0 success or yes, 1 no, denied or not found, 2 wrong usage.
#[derive(Parser)]
#[command(name = "kubectl-keywright", bin_name = "kubectl keywright", version, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: PluginCommand,
}

#[derive(Args, Clone, Default)]
struct Global {
    /// The namespace; the default is that of the context.
    #[arg(short, long, global = true)]
    namespace: Option<String>,

    /// The context of the kubeconfig.
    #[arg(long, global = true)]
    context: Option<String>,

    /// The kubeconfig; the default is that of kubectl.
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,

    /// The user to impersonate.
    #[arg(long = "as", global = true, value_name = "USER")]
    as_user: Option<String>,

    /// A group to impersonate; may be repeated.
    #[arg(long = "as-group", global = true, value_name = "GROUP", requires = "as_user")]
    as_groups: Vec<String>,

    /// Disable colors if not empty.
    #[arg(long, env = "NO_COLOR", global = true, hide = true, default_value = "", hide_default_value = true)]
    no_color: String,
}

/// The format of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Names only.
    Name,
    /// A table with more columns.
    Wide,
}

/// The keys that a command selects.
#[derive(Args, Clone, Default)]
struct Selection {
    /// Select keys in all namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,

    /// Select keys by label, in the syntax of kubectl.
    #[arg(short = 'l', long)]
    selector: Option<String>,
}

/// Whether a command only reports its changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DryRun {
    /// Make the changes.
    #[default]
    None,
    /// Only report the changes.
    Client,
    /// Let the API server validate the changes without making them.
    Server,
}

#[derive(Subcommand)]
enum PluginCommand {
    /// List keys.
    #[command(visible_alias = "ls")]
    List(show::ListArgs),
    /// Show a key in detail: permissions, ids of its values, access policy, and conditions with their remedies.
    Describe(show::DescribeArgs),
    /// Show the value of a key.
    Reveal(reveal::RevealArgs),
    /// Request a new value of a key.
    Rotate(change::RotateArgs),
    /// Activate keys. Their values stay the same.
    Activate(change::SwitchArgs),
    /// Deactivate keys. Verifiers reject them until they are activated again.
    Deactivate(change::SwitchArgs),
    /// Delete keys. Verifiers reject their values permanently.
    Delete(change::DeleteArgs),
    /// Deactivate all matching keys, for example after a leak.
    Revoke(change::RevokeArgs),
    /// Show whether you may perform an operation, and by which binding.
    CanI(rights::CanIArgs),
    /// Show whether a user may view, manage and delete a key, and which gate, rule and binding decide.
    Explain(rights::ExplainArgs),
    /// Find the key of a value. The value is read from standard input.
    Identify(identify::IdentifyArgs),
    /// Accept the value in a Secret that the operator cannot authenticate, such as one from a backup. Needs the right
    /// to restore keys.
    Accept(accept::AcceptArgs),
    /// List and describe legacy keys.
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
                CliError::Refused(message) => (message, ExitCode::FAILURE),
                CliError::Usage(message) => (message, ExitCode::from(2)),
            };
            report(&format!("error: {}", print::line(&message)));
            return code;
        }
    };
    // A closed pipe, as of `| head`, is not an error.
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    code
}

/// Writes a line to standard error, so that standard output holds only the result of the command.
fn report(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

async fn run(cli: Cli) -> Result<Reply> {
    // The first three commands must work without a cluster. `identify` checks its input before it connects.
    let (cluster, command) = match cli.command {
        PluginCommand::Completion(args) => return generate::completion(&args),
        PluginCommand::Man(args) => return generate::man(&args),
        PluginCommand::Policy(policy::PolicyCommand::Import(args)) => return policy::import(&args, &cli.global),
        PluginCommand::Identify(args) => {
            let value = identify::read(&args)?;
            return identify::identify(&ClusterClient::connect(cli.global).await?, &value).await;
        }
        command => (ClusterClient::connect(cli.global).await?, command),
    };
    match command {
        PluginCommand::List(args) => show::list(&cluster, &args, false).await,
        PluginCommand::Describe(args) => show::describe(&cluster, &args, false).await,
        PluginCommand::Legacy(show::LegacyCommand::List(args)) => show::list(&cluster, &args, true).await,
        PluginCommand::Legacy(show::LegacyCommand::Describe(args)) => show::describe(&cluster, &args, true).await,
        PluginCommand::Reveal(args) => reveal::reveal(&cluster, &args).await,
        PluginCommand::Rotate(args) => change::rotate(&cluster, &args).await,
        PluginCommand::Activate(args) => change::switch(&cluster, &args, true).await,
        PluginCommand::Deactivate(args) => change::switch(&cluster, &args, false).await,
        PluginCommand::Delete(args) => change::delete(&cluster, &args).await,
        PluginCommand::Revoke(args) => change::revoke(&cluster, &args).await,
        PluginCommand::CanI(args) => rights::can_i(&cluster, &args).await,
        PluginCommand::Explain(args) => rights::explain(&cluster, &args).await,
        PluginCommand::Accept(args) => accept::accept(&cluster, &args).await,
        PluginCommand::Migrate(args) => migrate::migrate(&cluster, &args).await,
        PluginCommand::Policy(policy::PolicyCommand::Export(args)) => policy::export(&cluster, &args).await,
        PluginCommand::Completion(_)
        | PluginCommand::Man(_)
        | PluginCommand::Identify(_)
        | PluginCommand::Policy(_) => Ok(Reply::yes("")),
    }
}

/// A client with the rights of the user, and the global options.
struct ClusterClient {
    client: Client,
    namespace: String,
    global: Global,
    clock: Clock,
    color: bool,
}

impl ClusterClient {
    async fn connect(global: Global) -> Result<Self> {
        let options = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
        let unusable = |error: &dyn std::fmt::Display| CliError::Refused(format!("cannot use the kubeconfig: {error}"));
        let mut config = match &global.kubeconfig {
            Some(file) => {
                let kubeconfig = Kubeconfig::read_from(file).map_err(|error| unusable(&error))?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| unusable(&error))?
            }
            None if options.context.is_some() => {
                Config::from_kubeconfig(&options).await.map_err(|error| unusable(&error))?
            }
            None => Config::infer().await.map_err(|error| unusable(&error))?,
        };
        if let Some(user) = &global.as_user {
            config.auth_info.impersonate = Some(user.clone());
            config.auth_info.impersonate_groups = (!global.as_groups.is_empty()).then(|| global.as_groups.clone());
        }
        let namespace = global.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| unusable(&error))?;
        let color = global.no_color.is_empty() && std::io::stdout().is_terminal();
        Ok(Self { client, namespace, global, clock: Clock::system(), color })
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

    /// Returns the PermissionCatalogs, oldest first, and the catalog that results from merging them.
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
        _ => Err("must be Personal, SendYourData or Team".to_owned()),
    }
}
