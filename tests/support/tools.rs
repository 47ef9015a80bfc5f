//! Paths of the programs of the tests. `tests/tools/build` builds or downloads them, or they are in the folder
//! `KUBEBUILDER_ASSETS`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{repository, target};

/// The programs of a control plane of one Kubernetes version.
pub struct Tools {
    pub etcd: PathBuf,
    pub apiserver: PathBuf,
    pub controller_manager: PathBuf,
    pub kubectl: PathBuf,
    pub helm: PathBuf,
}

impl Tools {
    /// Finds the programs of the set `kubernetes-{version}`, and builds missing ones.
    pub fn find(version: &str) -> Result<Self> {
        let set = format!("kubernetes-{version}");
        Ok(Self {
            etcd: find("etcd", "etcd")?,
            apiserver: find(&set, "kube-apiserver")?,
            controller_manager: find(&set, "kube-controller-manager")?,
            kubectl: find(NEWEST, "kubectl")?,
            helm: find("helm", "helm")?,
        })
    }
}

const NEWEST: &str = "kubernetes-1.37";

/// Finds a program of a set, and builds the set if the program is missing.
pub fn find(set: &str, program: &str) -> Result<PathBuf> {
    // As in tests/tools/build, the assets replace only the default version and etcd.
    if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS")
        && (set == NEWEST || set == "etcd")
    {
        let asset = PathBuf::from(assets).join(program);
        if asset.exists() {
            return Ok(asset);
        }
    }
    let binary = target()?.join("tools").join(set).join(program);
    if !binary.exists() {
        let mut make = Command::new(repository().join("tests/tools/build"));
        // Progress messages go to standard error.
        make.arg(set).env("CARGO_TARGET_DIR", target()?).stdout(std::io::stderr());
        let status = make.status().context("cannot run tests/tools/build")?;
        ensure!(status.success() && binary.exists(), "tests/tools/build {set} failed");
    }
    Ok(binary)
}
