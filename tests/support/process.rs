//! Any process of a test besides the operator: it ends with the test, by its id.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use tokio::net::TcpStream;

use super::control_plane::tail;
use super::guardian::Guardian;
use super::{ControlPlane, PATIENCE, retry, serial};

/// A process of a test. Dropping it kills it.
pub struct Process {
    child: Mutex<Child>,
    log: PathBuf,
}

impl Process {
    /// Starts `program` in `folder`, with its output in a file of the control plane's folder.
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

    /// Waits until something answers at `address`.
    pub async fn wait_for(&self, address: SocketAddr) -> Result<()> {
        let answers = retry("it answers", PATIENCE, async || {
            if let Some(status) = self.child.lock().unwrap().try_wait()? {
                return Ok(Err(status));
            }
            TcpStream::connect(address).await?;
            Ok(Ok(()))
        });
        match answers.await.with_context(|| tail(&self.log))? {
            Ok(()) => Ok(()),
            Err(status) => bail!("it ended with {status}; {}", tail(&self.log)),
        }
    }

    /// The number of the process.
    pub fn id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// The last lines that it has written, for the error message.
    pub fn tail(&self) -> String {
        tail(&self.log)
    }

    /// Everything that it has written.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it, as a node that loses its power does.
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

/// A port of the loopback address.
pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// What the kernel says of the memory of a process, in bytes: `VmRSS:` is now, `VmHWM:` the most ever.
pub fn memory(id: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context("the process is gone")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
