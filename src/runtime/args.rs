//! The command line. Each flag also has an environment variable. The chart sets flags, so that `kubectl describe` shows
//! them.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::{
    domain::{credential::Source, duration, export},
    telemetry::TelemetryArgs,
    verify::freshness::WATCH,
};

/// API keys as Kubernetes resources.
#[derive(Debug, Parser)]
#[command(name = "keywright", version, about, propagate_version = true)]
pub struct Args {
    /// The subcommand.
    #[command(subcommand)]
    pub command: ServerCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Run the operator: the webhook on every replica, and the controllers on the leader.
    Operator(Box<OperatorArgs>),
    /// Run the verifier, which decides for Envoy, nginx, Caddy, Traefik and others whether a request is allowed. Any
    /// number of replicas.
    Verifier(Box<VerifierArgs>),
    /// Print a ClusterRole for each role and each preset of a catalog, as YAML.
    ClusterRoles {
        /// The file with the PermissionCatalog.
        catalog: PathBuf,
    },
    /// Print the CRDs as YAML.
    Crds {
        /// Write one file for each CRD into this directory instead.
        #[arg(long)]
        directory: Option<PathBuf>,
    },
}

/// The flags of the operator.
#[derive(Clone, Debug, clap::Args)]
pub struct OperatorArgs {
    /// The address of the webhook.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_ADDRESS", default_value = "0.0.0.0:9443")]
    pub webhook_address: SocketAddr,

    /// The IP address at which other replicas reach the webhook of this one. While this replica leads, annotation
    /// keywright.dev/address of the Lease contains the address, and other replicas send notices of writes to Secrets
    /// there. Absent: the address of the webhook, unless it is a wildcard.
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

    /// The MutatingWebhookConfiguration, which stamps the creator of an object.
    #[arg(long, env = "KEYWRIGHT_MUTATING_WEBHOOK_CONFIGURATION", default_value = "keywright")]
    pub mutating_webhook_configuration: String,

    /// Check gate 1 in the webhook too. Only for clusters without the chart's ValidatingAdmissionPolicies, which check
    /// it also while the operator is down.
    #[arg(long, env = "KEYWRIGHT_CHECK_ROLES")]
    pub check_roles: bool,

    /// The time for which a granted right is cached. A revoked right counts for as long. 0s disables the cache.
    #[arg(long, env = "KEYWRIGHT_ACCESS_CACHE_TTL", default_value = "5s", value_parser = parse_duration_or_zero)]
    pub access_cache_ttl: Duration,

    /// The Secret that holds the CA of the webhook's certificates.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_SECRET", default_value = "keywright-webhook-ca")]
    pub webhook_ca_secret: String,

    /// The validity of that CA. It is replaced after two thirds, without a gap.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_VALIDITY", default_value = "8760h", value_parser = parse_duration)]
    pub webhook_ca_validity: Duration,

    /// The validity of a replica's certificate. It is replaced after two thirds.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CERT_VALIDITY", default_value = "168h", value_parser = parse_duration)]
    pub webhook_cert_validity: Duration,

    /// The time for which a new CA is published before certificates depend on it, so that all API servers notice it.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CA_SETTLE", default_value = "1m", value_parser = parse_duration)]
    pub webhook_ca_settle: Duration,

    /// Use tls.crt and tls.key from this directory, as cert-manager writes them, instead of the operator's CA.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CERT_DIR", conflicts_with = "webhook_ca_secret")]
    pub webhook_cert_dir: Option<PathBuf>,

    /// Accept admission reviews only from clients with a certificate of a CA in this file (PEM). The admission
    /// configuration of the API server contains its certificate. Changes of the file need no restart. Absent: accept
    /// all clients.
    #[arg(long, env = "KEYWRIGHT_WEBHOOK_CLIENT_CA", value_name = "FILE")]
    pub webhook_client_ca: Option<PathBuf>,

    /// The Service of the verifier. The operator issues a certificate for its names from the webhook's CA and renews
    /// it, with the same validity as the webhook's. Absent: none.
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

    /// Write the digests of working values into NAMESPACE/NAME, for gateways that check digests themselves. If one
    /// object is too small, NAME-2 and so on contain the others. Absent: no export.
    #[arg(long, env = "KEYWRIGHT_EXPORT_DIGESTS", value_name = "NAMESPACE/NAME", value_parser = parse_object_name)]
    pub export_digests: Option<ObjectName>,

    /// The kind of these objects: ConfigMap, or Secret for gateways that read only Secrets, such as agentgateway.
    #[arg(long, env = "KEYWRIGHT_EXPORT_KIND", value_name = "ConfigMap|Secret", default_value = "ConfigMap")]
    pub export_kind: export::ExportKind,

    /// Apply the PermissionCatalogs of the YAML files in this directory, one in each file. Each new leader overwrites
    /// them, so use objects of other names for your own catalogs.
    #[arg(long, env = "KEYWRIGHT_CATALOG_DIR")]
    pub catalog_dir: Option<PathBuf>,

    /// The Lease by which replicas elect a leader.
    #[arg(long, env = "KEYWRIGHT_LEASE_NAME", default_value = "keywright-operator")]
    pub lease_name: String,

    /// The number of ApiKeys that are reconciled at the same time.
    #[arg(long, env = "KEYWRIGHT_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,

    /// The interval of checks of each key's Secret, which find deletions and changes without a notice from the API
    /// server.
    #[arg(long, env = "KEYWRIGHT_SECRET_CHECK_INTERVAL", default_value = "6h", value_parser = parse_duration)]
    pub secret_check_interval: Duration,

    /// The Secret with the sealing keys.
    #[arg(long, env = "KEYWRIGHT_SEALING_SECRET", default_value = "keywright-sealing-keys")]
    pub sealing_secret: String,

    /// The time after which a KeyReveal is deleted.
    #[arg(long, env = "KEYWRIGHT_REVEAL_TTL", default_value = "10m", value_parser = parse_duration)]
    pub reveal_ttl: Duration,

    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,

    /// The name of this replica, unique among the replicas.
    #[arg(long, env = "POD_NAME")]
    pub pod_name: String,

    /// The namespace of the operator's own objects.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
}

impl OperatorArgs {
    /// The address at which other replicas reach the webhook of this one. `None` if it is not known.
    #[must_use]
    pub fn advertised(&self) -> Option<SocketAddr> {
        let own = Some(self.webhook_address.ip()).filter(|ip| !ip.is_unspecified());
        self.advertise_address.or(own).map(|ip| SocketAddr::new(ip, self.webhook_address.port()))
    }
}

/// The flags of the verifier.
#[derive(Clone, Debug, clap::Args)]
pub struct VerifierArgs {
    /// The address of all front ends, over HTTP/1.1 and HTTP/2.
    #[arg(long, env = "KEYWRIGHT_ADDRESS", default_value = "0.0.0.0:9191")]
    pub address: SocketAddr,

    /// The address of /healthz, /readyz and /metrics.
    #[arg(long, env = "KEYWRIGHT_HEALTH_ADDRESS", default_value = "0.0.0.0:8080")]
    pub health_address: SocketAddr,

    /// Serve TLS with tls.crt and tls.key from this directory. Changes of the files need no restart. Absent: plain
    /// HTTP, for a proxy on the same machine or a mesh that encrypts.
    #[arg(long, env = "KEYWRIGHT_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,

    /// The maximum number of open connections. For a further connection, an idle one is closed: the longest idle of the
    /// client with the most connections. If none is idle, the further one is rejected. Each connection takes 25 kB, or
    /// 50 kB with long request headers.
    #[arg(long, env = "KEYWRIGHT_MAX_CONNECTIONS", default_value = "1024")]
    pub max_connections: NonZeroUsize,

    /// The sources of keys: authorization (Authorization: Bearer KEY), header:NAME or query:NAME. A request with two
    /// keys is rejected.
    #[arg(long, env = "KEYWRIGHT_KEY_FROM", value_delimiter = ',', default_value = "authorization,header:x-api-key")]
    pub key_from: Vec<Source>,

    /// The requirement of routes that name no permission; `none` accepts any working key. Absent: requests to such
    /// routes are rejected.
    #[arg(long, env = "KEYWRIGHT_DEFAULT_PERMISSION")]
    pub default_permission: Option<String>,

    /// The time without a response of the API server after which all requests are rejected, since keys may have been
    /// revoked. 0s for no limit.
    #[arg(long, env = "KEYWRIGHT_MAX_STALENESS", default_value = "10m", value_parser = parse_staleness)]
    pub max_staleness: Duration,

    /// The permission that a key needs to introspect others (RFC 7662); off disables introspection.
    #[arg(
        long,
        env = "KEYWRIGHT_INTROSPECTION_PERMISSION",
        default_value = "team-custom-api-keys:ReadConfig",
        value_parser = parse_introspection_permission
    )]
    pub introspection_permission: String,

    /// The permission that a key needs to introspect keys of other namespaces. Catalog `keywright` of the chart defines
    /// it. off: no key may.
    #[arg(
        long,
        env = "KEYWRIGHT_INTROSPECTION_CLUSTER_PERMISSION",
        default_value = "api-keys:IntrospectAll",
        value_parser = parse_introspection_permission
    )]
    pub introspection_cluster_permission: String,

    /// Include the name and the namespace of the ApiKey in rejections. Otherwise they contain the id of the key.
    #[arg(long, env = "KEYWRIGHT_TELL_KEY_NAMES")]
    pub tell_key_names: bool,

    /// The interval of writes of a key's last use to its status. 0s: never, so that the verifier needs no right to
    /// patch apikeys/status.
    #[arg(long, env = "KEYWRIGHT_LAST_USED_INTERVAL", default_value = "1h", value_parser = parse_duration_or_zero)]
    pub last_used_interval: Duration,

    /// Log one of so many allowed requests. 0: none.
    #[arg(long, env = "KEYWRIGHT_LOG_ALLOWED_ONE_IN", default_value_t = 1000)]
    pub log_allowed_one_in: u64,

    /// Log at most so many rejections per second. 0: none.
    #[arg(long, env = "KEYWRIGHT_LOG_REFUSED_PER_SECOND", default_value_t = 20)]
    pub log_refused_per_second: u64,

    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// An object in a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

fn parse_object_name(text: &str) -> Result<ObjectName, String> {
    // The name is also the value of a label, which limits its length.
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
    duration::parse(text).ok_or_else(|| format!("{text:?} is not a duration: write one such as 5s or 0s"))
}

/// The API server of a cluster without changes answers once per watch, so a limit below two watches would be exceeded.
fn parse_staleness(text: &str) -> Result<Duration, String> {
    let min = 2 * WATCH;
    parse_duration_or_zero(text).and_then(|duration| {
        let valid = duration.is_zero() || duration >= min;
        valid.then_some(duration).ok_or_else(|| {
            format!("{text:?} is too short: write a duration of at least {}s, or 0s for no limit", min.as_secs())
        })
    })
}

/// `none` is not accepted, since any working key could then introspect others.
fn parse_introspection_permission(text: &str) -> Result<String, String> {
    let valid = text == "off" || text.contains(':') && !text.contains(',');
    valid.then(|| text.to_owned()).ok_or_else(|| format!("{text:?} is not a permission: write resource:Action, or off"))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    duration::parse(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("{text:?} is not a duration: write one such as 10m, 24h or 30s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_name_without_namespace_is_rejected() {
        let named = parse_object_name("gateway/api-keys").unwrap();
        assert_eq!((named.namespace.as_str(), named.name.as_str()), ("gateway", "api-keys"));
        for text in ["", "api-keys", "/api-keys", "gateway/", "a/b/c", "Gateway/a", "gateway/-a", &"a/".repeat(70)] {
            assert!(parse_object_name(text).unwrap_err().contains("NAMESPACE/NAME"), "{text}");
        }
    }

    #[test]
    fn a_wildcard_address_is_never_advertised() {
        let advertised = |args: &[&str]| {
            let fixed = ["keywright", "operator", "--pod-name=a", "--pod-namespace=b"];
            match Args::try_parse_from(fixed.iter().chain(args)).unwrap().command {
                ServerCommand::Operator(args) => args.advertised().map(|address| address.to_string()),
                _ => unreachable!(),
            }
        };
        assert_eq!(advertised(&[]), None);
        assert_eq!(advertised(&["--webhook-address=10.0.0.1:9443"]).as_deref(), Some("10.0.0.1:9443"));
        assert_eq!(advertised(&["--advertise-address=10.0.0.2"]).as_deref(), Some("10.0.0.2:9443"));
        assert_eq!(advertised(&["--advertise-address=fd00::2"]).as_deref(), Some("[fd00::2]:9443"));
    }

    #[test]
    fn the_flags_of_the_verifiers_certificate_require_each_other_and_the_operators_ca() {
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
