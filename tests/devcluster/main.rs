//! A development cluster without containers: `devcluster up | down | demo`.
//!
//! `up` starts a background process that runs the control plane, the operator and the verifier, which end with it. The
//! file `target/dev/pid` contains its process id and start time.

#[path = "../support/mod.rs"]
mod support;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use support::control_plane::output;
use support::guardian::start_time;
use support::tools::Tools;
use support::verifier::{Options as VerifierOptions, Verifier, send};
use support::{ControlPlane, Operator, retry};

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("devcluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let folder = support::target()?.join("dev");
    match std::env::args().nth(1).as_deref() {
        Some("up") => up(&folder).await,
        Some("down") => down(&folder).await,
        Some("demo") => demo().await,
        Some("serve") => serve(&folder).await,
        _ => bail!("usage: devcluster up | down | demo"),
    }
}

/// Starts the cluster unless it is running, and prints how to use it.
async fn up(folder: &Path) -> Result<()> {
    if running(folder).is_none() {
        remove(folder)?;
        std::fs::create_dir_all(folder)?;
        // Outside of the folder, so that the log of a failed start is kept when the folder is removed.
        let log_file = folder.with_extension("log");
        let log = File::create(&log_file)?;
        let mut server = Command::new(std::env::current_exe()?)
            .arg("serve")
            // A separate process group, so that Ctrl-C in this terminal does not end it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let id = server.id();
        let started = start_time(id).context("the background process ended at once")?;
        std::fs::write(folder.join("pid"), format!("{id} {started}"))?;
        println!("Starting the control plane, the chart and the operator ...");
        while !folder.join("ready").exists() {
            if let Some(status) = server.try_wait()? {
                bail!("the cluster did not start ({status}):\n{}", std::fs::read_to_string(log_file)?);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    } else if !folder.join("ready").exists() {
        bail!("another `devcluster up` is starting the cluster; see {}", folder.with_extension("log").display());
    } else {
        println!("The cluster is already running.");
    }
    let tools = Tools::find(&support::kubernetes_version())?;
    let tools = tools.kubectl.parent().context("kubectl has no parent folder")?;
    println!(
        "\n  export KUBECONFIG={}\n  export PATH={}:$PATH\n\nThe verifier listens on http://{}; an example of a path is /nginx/permission=none.\n\
         Logs are in {}. `make down` stops the cluster.",
        folder.join("kubeconfig").display(),
        tools.display(),
        std::fs::read_to_string(folder.join("ready"))?,
        folder.display(),
    );
    Ok(())
}

/// Runs the cluster until this process ends. Its guardian then ends the other processes.
async fn serve(folder: &Path) -> Result<()> {
    let (plane, operator) = cluster(ControlPlane::start_in(folder, &support::kubernetes_version()).await?).await?;
    let verifier = Verifier::start(&plane, VerifierOptions::default()).await?;
    std::fs::write(folder.join("ready"), verifier.address().to_string())?;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if start_time(operator.id()).is_none() {
            bail!("the operator has ended:\n{}", operator.log());
        }
    }
}

/// Stops the cluster if it is running.
async fn down(folder: &Path) -> Result<()> {
    let Some(id) = running(folder) else {
        remove(folder)?;
        println!("The cluster is not running.");
        return Ok(());
    };
    output(Command::new("/bin/sh").args(["-c", "kill -s TERM $1", "kill", &id.to_string()]))?;
    retry("the cluster ends", Duration::from_secs(20), async || {
        ensure!(!folder.exists(), "{} still exists", folder.display());
        Ok(())
    })
    .await?;
    println!("The cluster has stopped.");
    Ok(())
}

/// Demonstrates operator and verifier in a temporary cluster.
async fn demo() -> Result<()> {
    println!("Starting a control plane, the chart and the operator ...");
    let (plane, _operator) = cluster(ControlPlane::start(&support::kubernetes_version()).await?).await?;
    let kubectl = |args: &[&str]| -> Result<bool> {
        println!("\n$ kubectl {}", args.iter().map(|arg| quoted(arg)).collect::<Vec<_>>().join(" "));
        // Inherits the terminal, so that output and errors appear in order.
        Ok(plane.kubectl().args(args).current_dir(support::repository()).status()?.success())
    };
    let succeeds = |args: &[&str]| -> Result<()> {
        ensure!(kubectl(args)?, "kubectl {} failed", args.join(" "));
        Ok(())
    };

    println!("\nA team declares its keys:");
    succeeds(&["create", "namespace", "demo"])?;
    succeeds(&["apply", "-n", "demo", "-f", "examples/"])?;
    succeeds(&["wait", "-n", "demo", "--for=condition=Ready", "apikeys", "--all", "--timeout=60s"])?;
    succeeds(&["get", "apikeys", "-n", "demo"])?;

    println!("\nA workload reads the value of a key from its Secret (the value is deleted with this cluster):");
    let template = r#"-o=go-template={{index .data "key-value" | base64decode}}{{"\n"}}"#;
    succeeds(&["get", "secret", "-n", "demo", "checkout-telemetry-secret", template])?;

    println!(
        "\nA gateway asks the verifier to check a request with this value, on a route that requires a permission:"
    );
    let verifier = Verifier::start(&plane, VerifierOptions::default()).await?;
    verifier.wait_ready().await?;
    let value =
        plane.kubectl().args(["get", "secret", "-n", "demo", "checkout-telemetry-secret", template]).output()?;
    let value = String::from_utf8(value.stdout)?;
    let check = async |requirement: &str| -> Result<u16> {
        println!("\n> GET /nginx/{requirement}\n> Authorization: Bearer kws_...\n");
        let request = format!(
            "GET /nginx/{requirement} HTTP/1.1\r\nHost: verifier\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\r\n",
            value.trim()
        );
        let answer = send(verifier.address(), request.as_bytes()).await?;
        let shown = |line: &&str| ["HTTP", "x-keywright", "www-auth"].iter().any(|start| line.starts_with(start));
        println!(
            "{}",
            answer.head.lines().filter(shown).map(|line| format!("< {line}")).collect::<Vec<_>>().join("\n")
        );
        Ok(answer.status)
    };
    ensure!(check("permission=logs.data-ingress:SendData").await? == 200, "the key may not send data");
    ensure!(check("permission=alerts:ReadConfig").await? == 403, "the key may read alerts");
    succeeds(&[
        "patch",
        "apikey",
        "-n",
        "demo",
        "checkout-telemetry",
        "--type=merge",
        "-p",
        r#"{"spec":{"active":false}}"#,
    ])?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    ensure!(check("permission=logs.data-ingress:SendData").await? == 401, "the key still works");

    println!("\nAn invalid key is rejected:");
    println!("\n$ cat {INVALID}\n{}", std::fs::read_to_string(support::repository().join(INVALID))?);
    ensure!(!kubectl(&["apply", "-n", "demo", "-f", INVALID])?, "{INVALID} was accepted");
    println!("\nThe demonstration is complete; the cluster is stopped.");
    Ok(())
}

const INVALID: &str = "examples/refused/unknown-preset.yaml";

/// `arg`, quoted for a shell if it contains a space.
fn quoted(arg: &str) -> String {
    if arg.contains(' ') { format!("'{arg}'") } else { arg.to_owned() }
}

/// Installs the chart into `plane` and starts the operator.
async fn cluster(plane: ControlPlane) -> Result<(ControlPlane, Operator)> {
    let (_release, operator) = support::install(&plane).await?;
    Ok((plane, operator))
}

/// The id of the background process, if it is running. The start time distinguishes it from a later process with the
/// same id.
fn running(folder: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(folder.join("pid")).ok()?;
    let (id, started) = text.split_once(' ')?;
    let id = id.parse().ok()?;
    (start_time(id) == Some(started.parse().ok()?)).then_some(id)
}

/// Removes the folder of a cluster whose guardian could not remove it, for instance after a power loss.
fn remove(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
