//! Processes of a test besides the operator. They end with the test.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use tokio::net::TcpStream;

use super::control_plane::tail;
use super::guardian::Guardian;
use super::{ControlPlane, TIMEOUT, retry, serial};

/// A process of a test. Dropping it kills it.
pub struct Process {
    child: Mutex<Child>,
    log: PathBuf,
}

impl Process {
    /// Starts `program` in `folder`; its output goes to a log file in the control plane's folder.
    pub fn start(
        plane: &ControlPlane,
        program: &Path,
        folder: &Path,
        arguments: &[String],
        environment: &[(&str, &Path)],
    ) -> Result<Self> {
        let name = program.file_name().context("a program without a name")?.to_string_lossy().into_owned();
        let log = plane.folder().join(format!("{name}-{}.log", serial()));
        let output = File::create(&log)?;
        let mut command = Guardian::command(program);
        command.args(arguments).current_dir(folder).stdout(output.try_clone()?).stderr(output);
        command.env_clear().env("PATH", "/usr/bin:/bin").envs(environment.iter().copied());
        let child = plane.guardian.spawn(&mut command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child: Mutex::new(child), log })
    }

    /// Waits until the process accepts connections at `address`.
    pub async fn wait_for(&self, address: SocketAddr) -> Result<()> {
        let listening = retry("the process listens", TIMEOUT, async || {
            if let Some(status) = self.child.lock().unwrap().try_wait()? {
                return Ok(Err(status));
            }
            TcpStream::connect(address).await?;
            Ok(Ok(()))
        });
        match listening.await.with_context(|| tail(&self.log))? {
            Ok(()) => Ok(()),
            Err(status) => bail!("the process ended with {status}; {}", tail(&self.log)),
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// The last lines of its output, for error messages.
    pub fn tail(&self) -> String {
        tail(&self.log)
    }

    /// Its output until now.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The loopback address with `port`.
pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A memory field of `/proc/ID/status`, in bytes: `VmRSS:` is the current size, `VmHWM:` the peak.
pub fn memory(id: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context("the process has ended")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
