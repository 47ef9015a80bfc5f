//! Where the real binaries are: `tests/tools/build` makes or gets them, or `KUBEBUILDER_ASSETS` brings them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{repository, target};

/// The paths of all programs for one Kubernetes version.
pub struct Tools {
    pub etcd: PathBuf,
    pub apiserver: PathBuf,
    pub controller_manager: PathBuf,
    pub kubectl: PathBuf,
    pub helm: PathBuf,
}

impl Tools {
    /// Finds the programs of the set `kubernetes-{version}`, and builds what is missing.
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

/// Finds a program of a set, and builds the set if it is missing.
pub fn find(set: &str, program: &str) -> Result<PathBuf> {
    // As tests/tools/build has it: ready binaries stand for the default version, never for another one.
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
        // Its progress goes where a person sees it: the standard output of a test is hidden until it fails.
        make.arg(set).env("CARGO_TARGET_DIR", target()?).stdout(std::io::stderr());
        let status = make.status().context("cannot run tests/tools/build")?;
        ensure!(status.success() && binary.exists(), "tests/tools/build {set} failed");
    }
    Ok(binary)
}
