//! The command line. Every argument can be given by the environment as well; the chart uses arguments, so that
//! `kubectl describe` shows how a replica runs.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, Subcommand, ValueEnum};

use crate::{
    domain::{credential::Source, duration, export},
    verify::freshness::WATCH,
};

/// API keys as Kubernetes resources.
#[derive(Debug, Parser)]
#[command(name = "keywright", version, about, propagate_version = true)]
pub struct Args {
    /// What to run.
    #[command(subcommand)]
    pub command: Command,
}

/// What to run.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the operator: the controller, on the one replica that leads, and the webhook, on every replica.
    Operator(Box<OperatorArgs>),
    /// Run the verifier: it tells Envoy, nginx, Caddy, Traefik and others whether a request may pass. Any number of
    /// replicas.
    Verifier(Box<VerifierArgs>),
    /// Print a ClusterRole for each role and each preset of a catalogue, as YAML.
    ClusterRoles {
        /// The file with the PermissionCatalog.
        catalog: PathBuf,
    },
    /// Print the CRDs as YAML.
    Crds {
        /// Write one file a CRD into this directory instead.
        #[arg(long)]
        directory: Option<PathBuf>,
    },
}

/// How the operator runs.
#[derive(Clone, Debug, clap::Args)]
pub struct OperatorArgs {
    /// The address of the webhook.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_ADDRESS", default_value = "0.0.0.0:9443")]
    pub webhook_address: SocketAddr,

    /// The IP address at which other replicas reach the webhook of this one. While this replica leads, the address is in
    /// annotation keywright.dev/address of the Lease, and the others tell this replica which Secrets are written to.
    /// Absent: the address of the webhook, if it is not a wildcard.
    #[arg(long, env = "POD_IP")]
    pub advertise_address: Option<IpAddr>,

    /// The address of /healthz, /readyz and /metrics.
    #[arg(long, env = "KEYWRIGHT_HEALTH_ADDRESS", default_value = "0.0.0.0:8080")]
    pub health_address: SocketAddr,

    /// The Service through which the API server reaches the webhook.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_SERVICE", default_value = "keywright-webhook")]
    pub webhook_service: String,

    /// The ValidatingWebhookConfiguration.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CONFIGURATION", default_value = "keywright")]
    pub webhook_configuration: String,

    /// The MutatingWebhookConfiguration, which stamps who made an object.
    #[arg(long, env = "KEYWRIGHT_STAMP_CONFIGURATION", default_value = "keywright")]
    pub stamp_configuration: String,

    /// Ask for the permissions of gate 1 in the webhook too. Only for clusters without the chart's
    /// ValidatingAdmissionPolicies, which ask for them also while the operator is down.
    #[arg(long, env = "KEYWRIGHT_CHECK_ROLES")]
    pub check_roles: bool,

    /// How long it is remembered that somebody holds a right; a right that was taken away counts for as long. 0s for
    /// not at all.
    #[arg(long, env = "KEYWRIGHT_ACCESS_CACHE_TTL", default_value = "5s", value_parser = parse_duration_or_zero)]
    pub access_cache_ttl: Duration,

    /// The Secret that holds the CA of the webhook's certificates.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_SECRET", default_value = "keywright-webhook-ca")]
    pub webhook_ca_secret: String,

    /// How long that CA lives. It is replaced after two thirds, without a gap.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_VALIDITY", default_value = "8760h", value_parser = parse_duration)]
    pub webhook_ca_validity: Duration,

    /// How long a replica's certificate lives. It is replaced after two thirds.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CERT_VALIDITY", default_value = "168h", value_parser = parse_duration)]
    pub webhook_cert_validity: Duration,

    /// How long every API server gets to notice a new CA before certificates depend on it.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_SETTLE", default_value = "1m", value_parser = parse_duration)]
    pub webhook_ca_settle: Duration,

    /// Use tls.crt and tls.key from this directory, as cert-manager writes them, instead of a CA of our own.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CERT_DIR", conflicts_with = "webhook_ca_secret")]
    pub webhook_cert_dir: Option<PathBuf>,

    /// Answer admission reviews of clients alone that have a certificate of a CA in this file (PEM), as an API server has
    /// whose admission configuration says so. A new file is taken up without a restart. Absent: of anyone.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CLIENT_CA", value_name = "FILE")]
    pub webhook_client_ca: Option<PathBuf>,

    /// The Service of the verifier. A certificate for its names is issued from the webhook's CA and renewed; it lives as
    /// long as one of the webhook. Absent: none.
    #[arg(
        long,
        env = "KEYWRIGHT_VERIFIER_SERVICE",
        requires_all = ["verifier_tls_secret", "verifier_ca_config_map"],
        conflicts_with = "webhook_cert_dir"
    )]
    pub verifier_service: Option<String>,

    /// The Secret that receives that certificate, for the verifier to mount.
    #[arg(long, env = "KEYWRIGHT_VERIFIER_TLS_SECRET", requires = "verifier_service")]
    pub verifier_tls_secret: Option<String>,

    /// The ConfigMap that receives the CA, for clients of the verifier.
    #[arg(long, env = "KEYWRIGHT_VERIFIER_CA_CONFIG_MAP", requires = "verifier_service")]
    pub verifier_ca_config_map: Option<String>,

    /// Write the digests of the values that work into NAMESPACE/NAME, for gateways that check digests themselves; into
    /// NAME-2 and so on if one object does not hold them. Absent: nowhere.
    #[arg(long, env = "KEYWRIGHT_EXPORT_DIGESTS", value_name = "NAMESPACE/NAME", value_parser = parse_object_name)]
    pub export_digests: Option<ObjectName>,

    /// What these objects are: ConfigMap, or Secret for gateways that read no other, as agentgateway.
    #[arg(long, env = "KEYWRIGHT_EXPORT_KIND", value_name = "ConfigMap|Secret", default_value = "ConfigMap")]
    pub export_kind: export::Kind,

    /// Apply the PermissionCatalogs of the YAML files in this directory, one a file. They are written over at each
    /// start of a leader: put catalogues of your own into objects of other names.
    #[arg(long, env = "KEYWRIGHT_CATALOG_DIR")]
    pub catalog_dir: Option<PathBuf>,

    /// The Lease by which replicas elect a leader.
    #[arg(long, env = "KEYWRIGHT_LEASE_NAME", default_value = "keywright-operator")]
    pub lease_name: String,

    /// How many keys are worked on at the same time.
    #[arg(long, env = "KEYWRIGHT_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,

    /// How often the Secret of each key is looked at, to notice a deletion or a change that the API server did not
    /// announce.
    #[arg(long, env = "KEYWRIGHT_SECRET_CHECK_INTERVAL", default_value = "6h", value_parser = parse_duration)]
    pub secret_check_interval: Duration,

    /// The Secret that holds the keys that seal values.
    #[arg(long, env = "KEYWRIGHT_SEALING_SECRET", default_value = "keywright-sealing-keys")]
    pub sealing_secret: String,

    /// How long a KeyReveal lives.
    #[arg(long, env = "KEYWRIGHT_REVEAL_TTL", default_value = "10m", value_parser = parse_duration)]
    pub reveal_ttl: Duration,

    /// The format of the logs.
    #[arg(long, env = "KEYWRIGHT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or a filter such as info,keywright=debug.
    #[arg(long, env = "KEYWRIGHT_LOG", default_value = "info")]
    pub log: String,

    /// The name of this replica, unique among its peers.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,

    /// The namespace of the operator's own objects.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
}

impl OperatorArgs {
    /// Where other replicas reach the webhook of this one, if that is known.
    #[must_use]
    pub fn advertised(&self) -> Option<SocketAddr> {
        let own = Some(self.webhook_address.ip()).filter(|ip| !ip.is_unspecified());
        self.advertise_address.or(own).map(|ip| SocketAddr::new(ip, self.webhook_address.port()))
    }
}

/// How the verifier runs.
#[derive(Clone, Debug, clap::Args)]
pub struct VerifierArgs {
    /// The address of every front end, over HTTP/1.1 and HTTP/2.
    #[arg(long, env = "KEYWRIGHT_ADDRESS", default_value = "0.0.0.0:9191")]
    pub address: SocketAddr,

    /// The address of /healthz, /readyz and /metrics.
    #[arg(long, env = "KEYWRIGHT_HEALTH_ADDRESS", default_value = "0.0.0.0:8080")]
    pub health_address: SocketAddr,

    /// Serve TLS with tls.crt and tls.key from this directory; new ones are taken up without a restart. Absent means
    /// plain HTTP, for a proxy on the same machine or a mesh that encrypts.
    #[arg(long, env = "KEYWRIGHT_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,

    /// How many connections may be open at a time. For a further one, that which was idle the longest is closed; if none is
    /// idle, it is rejected. Each takes 25 kB, and 50 kB if requests have long heads.
    #[arg(long, env = "KEYWRIGHT_MAX_CONNECTIONS", default_value = "1024")]
    pub max_connections: NonZeroUsize,

    /// Where keys are read from: authorization (Authorization: Bearer KEY), header:NAME or query:NAME. Several may be
    /// given; a request that carries two keys is refused.
    #[arg(long, env = "KEYWRIGHT_KEY_FROM", value_delimiter = ',', default_value = "authorization,header:x-api-key")]
    pub key_from: Vec<Source>,

    /// The permission that a route asks for that names none; `none` lets any working key pass. Absent means that such a
    /// route is refused.
    #[arg(long, env = "KEYWRIGHT_DEFAULT_PERMISSION")]
    pub default_permission: Option<String>,

    /// How long the API server may be silent before nobody passes any more, since keys could have been revoked
    /// meanwhile. 0s for any time.
    #[arg(long, env = "KEYWRIGHT_MAX_STALENESS", default_value = "10m", value_parser = parse_staleness)]
    pub max_staleness: Duration,

    /// The permission that a key needs to introspect others (RFC 7662); off turns introspection off.
    #[arg(
        long,
        env = "KEYWRIGHT_INTROSPECTION_PERMISSION",
        default_value = "team-custom-api-keys:ReadConfig",
        value_parser = parse_introspection_permission
    )]
    pub introspection_permission: String,

    /// The permission with which a key introspects keys of every namespace; without it, those of its own. Of the chart's
    /// catalogues, `keywright` has it. off means that no key does.
    #[arg(
        long,
        env = "KEYWRIGHT_INTROSPECTION_CLUSTER_PERMISSION",
        default_value = "api-keys:IntrospectAll",
        value_parser = parse_introspection_permission
    )]
    pub introspection_cluster_permission: String,

    /// Tell a client the name and the namespace of its ApiKey when its request may not pass. Otherwise it is told the id.
    #[arg(long, env = "KEYWRIGHT_TELL_KEY_NAMES")]
    pub tell_key_names: bool,

    /// How often the last use of a key is written to its status. 0s for never: then no right to patch apikeys/status is
    /// needed.
    #[arg(long, env = "KEYWRIGHT_LAST_USED_INTERVAL", default_value = "1h", value_parser = parse_duration_or_zero)]
    pub last_used_interval: Duration,

    /// Log one in so many requests that pass. 0 for none.
    #[arg(long, env = "KEYWRIGHT_LOG_ALLOWED_ONE_IN", default_value_t = 1000)]
    pub log_allowed_one_in: u64,

    /// Log at most so many refusals a second. 0 for none.
    #[arg(long, env = "KEYWRIGHT_LOG_REFUSED_PER_SECOND", default_value_t = 20)]
    pub log_refused_per_second: u64,

    /// The format of the logs.
    #[arg(long, env = "KEYWRIGHT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or a filter such as info,keywright=debug.
    #[arg(long, env = "KEYWRIGHT_LOG", default_value = "info")]
    pub log: String,
}

/// The format of the logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A JSON object a line.
    Json,
    /// For people.
    Text,
}

/// An object in a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

fn parse_object_name(text: &str) -> Result<ObjectName, String> {
    // A label holds the name, so it is no longer than a label may be.
    let valid = |part: &str| {
        (1..=63).contains(&part.len())
            && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.split_once('/')
        .filter(|(namespace, name)| valid(namespace) && valid(name))
        .map(|(namespace, name)| ObjectName { namespace: namespace.to_owned(), name: name.to_owned() })
        .ok_or_else(|| format!("{text:?} does not name an object: write NAMESPACE/NAME, such as gateway/api-keys"))
}

fn parse_duration_or_zero(text: &str) -> Result<Duration, String> {
    duration::parse(text).ok_or_else(|| format!("{text:?} is no duration: write one such as 5s or 0s"))
}

/// Shorter than two watches, a cluster in which nothing happens would count as silent.
fn parse_staleness(text: &str) -> Result<Duration, String> {
    let least = 2 * WATCH;
    parse_duration_or_zero(text).and_then(|duration| {
        let good = duration.is_zero() || duration >= least;
        good.then_some(duration).ok_or_else(|| format!("{text:?} is too short: at least {}s, or 0s", least.as_secs()))
    })
}

/// Any working key would do, if none were asked for.
fn parse_introspection_permission(text: &str) -> Result<String, String> {
    let good = text == "off" || text.contains(':') && !text.contains(',');
    good.then(|| text.to_owned())
        .ok_or_else(|| format!("{text:?} is no permission: write one, resource:Action, or off"))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    duration::parse(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("{text:?} is no duration: write one such as 10m, 24h or 30s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_named_with_its_namespace() {
        let named = parse_object_name("gateway/api-keys").unwrap();
        assert_eq!((named.namespace.as_str(), named.name.as_str()), ("gateway", "api-keys"));
        for text in ["", "api-keys", "/api-keys", "gateway/", "a/b/c", "Gateway/a", "gateway/-a", &"a/".repeat(70)] {
            assert!(parse_object_name(text).unwrap_err().contains("NAMESPACE/NAME"), "{text}");
        }
    }

    #[test]
    fn a_replica_advertises_an_address_at_which_others_can_reach_it() {
        let advertised = |args: &[&str]| {
            let fixed = ["keywright", "operator", "--pod-name=a", "--pod-namespace=b"];
            match Args::try_parse_from(fixed.iter().chain(args)).unwrap().command {
                Command::Operator(args) => args.advertised().map(|address| address.to_string()),
                _ => unreachable!(),
            }
        };
        assert_eq!(advertised(&[]), None);
        assert_eq!(advertised(&["--webhook-address=10.0.0.1:9443"]).as_deref(), Some("10.0.0.1:9443"));
        assert_eq!(advertised(&["--advertise-address=10.0.0.2"]).as_deref(), Some("10.0.0.2:9443"));
        assert_eq!(advertised(&["--advertise-address=fd00::2"]).as_deref(), Some("[fd00::2]:9443"));
    }

    #[test]
    fn a_certificate_for_the_verifier_needs_a_place_to_be_put() {
        let parse = |args: &[&str]| {
            let fixed = ["keywright", "operator", "--pod-name=a", "--pod-namespace=b"];
            Args::try_parse_from(fixed.iter().chain(args)).map(drop).map_err(|error| error.to_string())
        };
        let (secret, map) = ("--verifier-tls-secret=s", "--verifier-ca-config-map=m");
        parse(&[]).unwrap();
        parse(&["--verifier-service=v", secret, map]).unwrap();
        for incomplete in [&["--verifier-service=v"][..], &["--verifier-service=v", secret], &[secret], &[map]] {
            assert!(parse(incomplete).unwrap_err().contains("required"), "{incomplete:?}");
        }
        let both = parse(&["--verifier-service=v", secret, map, "--webhook-cert-dir=/x"]).unwrap_err();
        assert!(both.contains("cannot be used with"), "{both}");
    }
}
