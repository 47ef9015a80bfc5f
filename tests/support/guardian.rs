//! Ends every process that a test started, no matter how the test ended.
//!
//! Destructors run neither for statics nor when a process is killed, but the kernel always closes the pipes of a
//! process. The guardian is a shell that reads process ids from a pipe and ends these processes when the pipe closes.
//! It finds processes by id, never by name.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result};

/// Reads `PID:STARTTIME` lines. At the end of its input it sends SIGTERM to the processes, the newest first, waits up
/// to three seconds (the apiserver waits for open watches, and for etcd without limit), kills the remaining ones and
/// removes the folder `$1`. The start time distinguishes a process from a later one with the same id.
const SCRIPT: &str = r#"
processes=
while read -r process; do processes="$process $processes"; done
alive() {
    stat=$(cat "/proc/${1%:*}/stat" 2>/dev/null) || return
    set -- "${1#*:}" ${stat##*) }
    [ "${21}" = "$1" ] && [ "$2" != Z ]
}
signal() {
    found=1
    for process in $processes; do
        if alive "$process"; then found=0; kill -s "$1" "${process%:*}"; fi
    done
    return $found
}
signal TERM
tries=30
while [ $tries -gt 0 ] && signal 0; do sleep 0.1; tries=$((tries - 1)); done
signal KILL && sleep 0.2
rm -rf "$1"
"#;

/// Waits for a line before it starts the program: the guardian then has its id, so the process is always ended.
const START: &str = r#"read -r _ && exec "$@" </dev/null"#;

/// The guardian of this process's children and of one folder. Dropping it ends the children, removes the folder, and
/// waits for both.
pub struct Guardian {
    shell: Child,
    ids: Mutex<Option<ChildStdin>>,
}

impl Guardian {
    /// Starts a guardian that removes `folder` at its end.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "guardian"])
            .arg(folder)
            // A separate process group: Ctrl-C in the terminal must reach the test, not its guardian.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start sh")?;
        let ids = Mutex::new(shell.stdin.take());
        Ok(Self { shell, ids })
    }

    /// A command for [`Guardian::spawn`]. `program` must be a path; its standard input is empty.
    pub fn command(program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", START, "start"]).arg(program);
        command
    }

    /// Starts a command of [`Guardian::command`] under this guardian.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let mut child = command.process_group(0).stdin(Stdio::piped()).spawn().context("cannot start /bin/sh")?;
        let mut start = child.stdin.take().context("no pipe to the process")?;
        self.register(child.id())?;
        start.write_all(b"go\n")?;
        Ok(child)
    }

    fn register(&self, id: u32) -> Result<()> {
        let line = format!("{id}:{}\n", start_time(id).context("the process ended at once")?);
        let mut ids = self.ids.lock().unwrap();
        let ended = "the guardian has ended";
        ids.as_mut().context(ended)?.write_all(line.as_bytes()).context(ended)
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.ids.get_mut().unwrap().take();
        let _ = self.shell.wait();
    }
}

/// The start time of process `id`, in clock ticks since boot; `None` if it does not exist or is a zombie.
pub fn start_time(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may contain spaces and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    if fields[0] == "Z" { None } else { fields[19].parse().ok() }
}
