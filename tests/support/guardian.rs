//! Ends every process that a test started, however the test ended.
//!
//! Destructors do not run for statics, nor when a process is killed. A pipe is closed in every case: so a small shell
//! waits at the other end of one, knows the ids, and ends them by id when the pipe closes. It never looks for names.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result};

/// Reads one `PID:STARTTIME` a line. At the end of its input it asks the newest process first to stop, gives all of
/// them three seconds (the apiserver waits for open watches, and for etcd without end), kills what is left and removes
/// the folder `$1`. The start time tells a process from a later one that got the same id.
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

/// A process starts only after the guardian knows its id, so that there is no moment in which it could be left behind.
const START: &str = r#"read -r _ && exec "$@" </dev/null"#;

/// The watcher of this process's children, and of one folder. Dropping it ends them, and waits for that.
pub struct Guardian {
    shell: Child,
    orders: Mutex<Option<ChildStdin>>,
}

impl Guardian {
    /// Starts a guardian that removes `folder` when all is over.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "guardian"])
            .arg(folder)
            // A group of its own: Ctrl-C in the terminal has to reach the test, and not its guardian.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start sh")?;
        let orders = Mutex::new(shell.stdin.take());
        Ok(Self { shell, orders })
    }

    /// A command for [`Guardian::spawn`]: `program` has to be a path, and gets no standard input.
    pub fn command(program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", START, "start"]).arg(program);
        command
    }

    /// Starts what [`Guardian::command`] began, under this guardian.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let mut child = command.process_group(0).stdin(Stdio::piped()).spawn().context("cannot start /bin/sh")?;
        let mut held = child.stdin.take().context("no pipe to the process")?;
        self.watch(child.id())?;
        held.write_all(b"go\n")?;
        Ok(child)
    }

    fn watch(&self, id: u32) -> Result<()> {
        let order = format!("{id}:{}\n", start_time(id).context("the process ended at once")?);
        let mut orders = self.orders.lock().unwrap();
        orders.as_mut().context("the guardian is gone")?.write_all(order.as_bytes()).context("the guardian is gone")
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.orders.get_mut().unwrap().take();
        let _ = self.shell.wait();
    }
}

/// When the process `id` started, in the kernel's ticks; `None` if there is no such process, or only its remains.
pub fn start_time(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    if fields[0] == "Z" { None } else { fields[19].parse().ok() }
}
