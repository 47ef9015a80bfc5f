//! A certificate from files: `tls.crt`, `tls.key` and optionally `ca.crt`, as in a Secret of cert-manager.
//!
//! The content is polled, because the kubelet replaces a directory symlink, which watches on the files do not report.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    pki_types::{PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use tokio::{fs, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    CertError, Certificate, Now, Resolver,
    serving::{Leaf, provider},
};

const POLL: Duration = Duration::from_secs(10);

/// Serves the certificate in a directory, and each valid one that replaces it.
pub struct Files {
    directory: PathBuf,
    resolver: Arc<Resolver>,
    loaded: Option<FileContent>,
    poll: Duration,
}

/// The content of the files. It does not implement `Debug`, because it contains the key.
#[derive(PartialEq)]
struct FileContent {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Option<Vec<u8>>,
}

impl Files {
    /// Creates the source. Nothing is read before [`Self::run`].
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>, now: Now) -> Self {
        Self { directory: directory.into(), resolver: Resolver::new(now), loaded: None, poll: POLL }
    }

    /// Returns the resolver for the listener.
    #[must_use]
    pub fn resolver(&self) -> Arc<Resolver> {
        self.resolver.clone()
    }

    /// Keeps the certificate current until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let keep_current = async {
            loop {
                let result = self.load().await;
                self.resolver.report(result);
                sleep(self.poll).await;
            }
        };
        shutdown.run_until_cancelled(keep_current).await;
    }

    /// Serves the current content of the files, unless it is served already. After a failure, the previous certificate
    /// stays.
    async fn load(&mut self) -> Result<(), CertError> {
        let content = FileContent::read(&self.directory).await?;
        if self.loaded.as_ref() != Some(&content) {
            let leaf = content.leaf()?;
            if !leaf.validity.contains(self.resolver.now()) {
                return Err(CertError::NotValidNow("tls.crt"));
            }
            self.resolver.serve(leaf);
            self.loaded = Some(content);
        }
        Ok(())
    }
}

impl FileContent {
    async fn read(directory: &Path) -> Result<Self, CertError> {
        // The kubelet's symlink is resolved once, so that all files are of the same version.
        let directory = &fs::canonicalize(directory.join("..data")).await.unwrap_or_else(|_| directory.to_owned());
        let read =
            async |name: &'static str| fs::read(directory.join(name)).await.map_err(|e| CertError::File(name, e));
        let ca = match read("ca.crt").await {
            Err(CertError::File(_, error)) if error.kind() == ErrorKind::NotFound => None,
            read => Some(read?),
        };
        Ok(Self { cert: read("tls.crt").await?, key: read("tls.key").await?, ca })
    }

    fn leaf(&self) -> Result<Leaf, CertError> {
        let chain = Certificate::parse_all(&self.cert, "tls.crt")?;
        let validity = chain[0].validity();
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_| CertError::Unreadable("tls.key"))?;
        let chain = chain.iter().map(|cert| cert.der().clone()).collect();
        let key = CertifiedKey::from_der(chain, key, &provider())?;
        // The CA is reported and not served, so an invalid CA does not invalidate the pair.
        let ca = self.ca.as_deref().and_then(|ca| Certificate::parse_all(ca, "ca.crt").ok());
        let issuer = ca.and_then(|ca| ca.into_iter().min_by_key(|ca| ca.validity().until));
        Ok(Leaf { key: Arc::new(key), validity, issuer })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use jiff::Timestamp;
    use tokio::fs::{create_dir_all, remove_dir_all, remove_file, write};

    use super::*;
    use crate::certs::Authority;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    /// Returns the three files as cert-manager writes them.
    fn issue(now: i64) -> [(&'static str, Vec<u8>); 3] {
        let life = Duration::from_mins(10);
        let ca = Authority::generate(at(now), life).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["keywright.ns.svc".to_owned()]).unwrap();
        let time = |second: i64| {
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(at(second).as_second()).unwrap())
        };
        (params.not_before, params.not_after) = (time(now), time(now + 500));
        let ca_key = rcgen::KeyPair::from_pem(&ca.key_pem()).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_der(ca.cert().der(), ca_key).unwrap();
        let leaf = params.signed_by(&key, &issuer).unwrap();
        [
            ("tls.crt", leaf.pem().into_bytes()),
            ("tls.key", key.serialize_pem().into_bytes()),
            ("ca.crt", ca.cert().pem().as_bytes().to_vec()),
        ]
    }

    /// Replaces the content of the directory as the kubelet does: a new directory, then one symlink.
    async fn mount(directory: &Path, version: &str, files: &[(&str, Vec<u8>)]) {
        let to = directory.join(version);
        create_dir_all(&to).await.unwrap();
        for (name, content) in files {
            write(to.join(name), content).await.unwrap();
        }
        let _ = remove_file(directory.join("..data")).await;
        symlink(&to, directory.join("..data")).unwrap();
    }

    #[tokio::test]
    async fn a_valid_pair_is_served_and_an_invalid_pair_does_not_replace_it() {
        let directory = std::env::temp_dir().join(format!("keywright-files-{}", std::process::id()));
        let mut files = Files::new(&directory, Arc::new(|| at(10)));
        let resolver = files.resolver();
        let error = |result: Result<(), CertError>| result.unwrap_err().to_string();
        assert!(error(files.load().await).starts_with("cannot read tls.crt"));

        let first = issue(0);
        mount(&directory, "..1", &first).await;
        files.load().await.unwrap();
        resolver.trusted_by(&first[2].1, "keywright.ns.svc").unwrap();
        assert_eq!(resolver.status().leaf_not_after, Some(at(500)));
        assert_eq!(resolver.status().ca_not_after, Some(at(600)));

        let second = issue(5);
        let mismatched = [second[0].clone(), first[1].clone()];
        let expired = issue(-5000);
        let broken = [("tls.crt", b"no PEM".to_vec()), second[1].clone()];
        for (version, content) in [("..2", mismatched.as_slice()), ("..3", &expired), ("..4", &broken)] {
            mount(&directory, version, content).await;
            files.load().await.unwrap_err();
            resolver.trusted_by(&first[2].1, "keywright.ns.svc").unwrap();
        }

        // Plain files work like a mounted Secret, and ca.crt is optional.
        remove_file(directory.join("..data")).await.unwrap();
        for (name, content) in &second[..2] {
            write(directory.join(name), content).await.unwrap();
        }
        files.load().await.unwrap();
        resolver.trusted_by(&second[2].1, "keywright.ns.svc").unwrap();
        resolver.trusted_by(&first[2].1, "keywright.ns.svc").unwrap_err();
        assert_eq!(resolver.status().ca_not_after, None);
        remove_dir_all(&directory).await.unwrap();
    }
}
