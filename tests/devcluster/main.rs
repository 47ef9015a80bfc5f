//! A cluster for the developer's machine, without containers: `devcluster up | down | demo`.
//!
//! `up` leaves one process behind, the keeper. It owns the control plane and the operator, and they end with it: so
//! there is one process id to remember, in `target/dev/keeper`.

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
        Some("keep") => keep(&folder).await,
        _ => bail!("usage: devcluster up | down | demo"),
    }
}

/// Starts the cluster, unless it runs already, and says how to use it.
async fn up(folder: &Path) -> Result<()> {
    if keeper(folder).is_none() {
        clear(folder)?;
        std::fs::create_dir_all(folder)?;
        // Beside the folder: it has to tell what went wrong after the folder is gone.
        let log_file = folder.with_extension("log");
        let log = File::create(&log_file)?;
        let mut keeper = Command::new(std::env::current_exe()?)
            .arg("keep")
            // It outlives this terminal, and Ctrl-C in it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let id = keeper.id();
        let started = start_time(id).context("the keeper ended at once")?;
        std::fs::write(folder.join("keeper"), format!("{id} {started}"))?;
        println!("Starting the control plane, the chart and the operator ...");
        while !folder.join("ready").exists() {
            if let Some(status) = keeper.try_wait()? {
                bail!("the cluster did not start ({status}):\n{}", std::fs::read_to_string(log_file)?);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    } else if !folder.join("ready").exists() {
        bail!("another `devcluster up` is under way; see {}", folder.with_extension("log").display());
    } else {
        println!("It is up already.");
    }
    let tools = Tools::find(&support::kubernetes_version())?;
    let tools = tools.kubectl.parent().context("kubectl is in no folder")?;
    println!(
        "\n  export KUBECONFIG={}\n  export PATH={}:$PATH\n\nThe verifier answers at http://{}, as in /nginx/permission=none.\nLogs are in {}. `make down` ends it.",
        folder.join("kubeconfig").display(),
        tools.display(),
        std::fs::read_to_string(folder.join("ready"))?,
        folder.display(),
    );
    Ok(())
}

/// What the process that `up` leaves behind does until it is ended; its guardian then ends the rest.
async fn keep(folder: &Path) -> Result<()> {
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

/// Ends the cluster, if it runs.
async fn down(folder: &Path) -> Result<()> {
    let Some(id) = keeper(folder) else {
        clear(folder)?;
        println!("It is not up.");
        return Ok(());
    };
    output(Command::new("/bin/sh").args(["-c", "kill -s TERM $1", "kill", &id.to_string()]))?;
    retry("the cluster ends", Duration::from_secs(20), async || {
        ensure!(!folder.exists(), "{} is still there", folder.display());
        Ok(())
    })
    .await?;
    println!("It is down.");
    Ok(())
}

/// Shows what the operator does, in a cluster of its own that ends with the demonstration.
async fn demo() -> Result<()> {
    println!("Starting a control plane, the chart and the operator ...");
    let (plane, _operator) = cluster(ControlPlane::start(&support::kubernetes_version()).await?).await?;
    let kubectl = |args: &[&str]| -> Result<bool> {
        println!("\n$ kubectl {}", args.iter().map(|arg| quoted(arg)).collect::<Vec<_>>().join(" "));
        // Straight to the terminal, so that its output and its errors come in their order.
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

    println!("\nThe value of one of them, as its workload reads it (it ends with this cluster):");
    let template = r#"-o=go-template={{index .data "key-value" | base64decode}}{{"\n"}}"#;
    succeeds(&["get", "secret", "-n", "demo", "checkout-telemetry-secret", template])?;

    println!(
        "\nWhat a gateway asks of the verifier for a request with that value, on a route that needs a permission, and what it is told:"
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
        let told = |line: &&str| ["HTTP", "x-keywright", "www-auth"].iter().any(|start| line.starts_with(start));
        println!("{}", answer.head.lines().filter(told).map(|line| format!("< {line}")).collect::<Vec<_>>().join("\n"));
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

    println!("\nA mistake is refused at once:");
    println!("\n$ cat {MISTAKE}\n{}", std::fs::read_to_string(support::repository().join(MISTAKE))?);
    ensure!(!kubectl(&["apply", "-n", "demo", "-f", MISTAKE])?, "{MISTAKE} was accepted");
    println!("\nThat is all; the cluster ends now.");
    Ok(())
}

const MISTAKE: &str = "examples/refused/unknown-preset.yaml";

/// `arg` as a person would type it.
fn quoted(arg: &str) -> String {
    if arg.contains(' ') { format!("'{arg}'") } else { arg.to_owned() }
}

/// Installs the chart into `plane`, and runs the operator.
async fn cluster(plane: ControlPlane) -> Result<(ControlPlane, Operator)> {
    let (_release, operator) = support::install(&plane).await?;
    Ok((plane, operator))
}

/// The id of the keeper, if it runs. Its start time tells it from a later process with the same id.
fn keeper(folder: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(folder.join("keeper")).ok()?;
    let (id, started) = text.split_once(' ')?;
    let id = id.parse().ok()?;
    (start_time(id) == Some(started.parse().ok()?)).then_some(id)
}

/// Removes what a cluster left that ended together with its guardian, when the machine did.
fn clear(folder: &Path) -> Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}
