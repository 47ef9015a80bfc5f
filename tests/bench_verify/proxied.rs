//! The comparison through real proxies, configured by their examples and loaded by wrk: with the verifier, with the
//! no-op server, and on a route without checks.

use std::{fmt::Write, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    in_turn, median, seed,
    server::Server,
    support::{
        ControlPlane,
        gateways::{Gateway, Kind},
        output, retry,
        tools::find,
    },
};

/// The length of a run of wrk.
const SECONDS: u64 = 2;
/// The number of runs with each server.
const ROUNDS: usize = 11;
const CONNECTIONS: usize = 16;

/// The figures of one proxy.
pub struct Row {
    pub kind: Kind,
    pub verifier: Figures,
    pub noop: Figures,
    pub unchecked: Figures,
    /// The ratio of the CPU time for each check, verifier to no-op server: the median of consecutive runs.
    pub ratio: f64,
}

/// The output of wrk, and the CPU time of the authorization server.
pub struct Figures {
    pub per_second: f64,
    pub p50: Duration,
    pub p99: Duration,
    /// CPU time for each request, in microseconds.
    pub cpu: f64,
}

/// Measures each proxy with up to a thousand of the seeded keys.
pub async fn measure(plane: &ControlPlane, noop: &Server, keys: usize) -> Result<Vec<Row>> {
    let verifier = Server::verifier(plane).await?;
    retry("the verifier is ready", Duration::from_mins(2), async || verifier.get("/readyz").await).await?;
    let upstream = Server::noop().await?;
    let script = plane.folder().join("load.lua");
    let mut lua = "local keys = {".to_owned();
    // Starts at 1, because `revocation` deactivates each key whose number is a multiple of 100.
    for number in (1..keys).step_by((keys / 1000).max(1)) {
        write!(lua, "\"{}\",", seed::value(number))?;
    }
    lua.push_str("}\nlocal n = 0\nrequest = function()\n  n = n % #keys + 1\n");
    lua.push_str("  return wrk.format(\"GET\", nil, {[\"Authorization\"] = \"Bearer \" .. keys[n]})\nend\n");
    std::fs::write(&script, lua)?;
    let upstream: SocketAddr = upstream.address.parse()?;
    let mut rows = vec![];
    for kind in Kind::ALL {
        // Each server has its own proxy, so that both proxies stay warm.
        let with_verifier = Gateway::start(plane, kind, verifier.address.parse()?, upstream).await?;
        let with_noop = Gateway::start(plane, kind, noop.address.parse()?, upstream).await?;
        let slice = async |gateway: &Gateway, server: &Server, path: &str| -> Result<Figures> {
            let mut wrk = Command::new(find("wrk", "wrk")?);
            wrk.args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{SECONDS}s"), "--latency", "-s"]).arg(&script);
            wrk.arg(format!("http://{}{path}", gateway.address));
            let before = server.cpu()?;
            let text = tokio::task::spawn_blocking(move || output(&mut wrk)).await??;
            let used = server.cpu()?.saturating_sub(before);
            read(&text, used).with_context(|| format!("{kind:?} {path}:\n{text}"))
        };
        slice(&with_verifier, &verifier, "/alerts/1").await?;
        slice(&with_noop, noop, "/alerts/1").await?;
        let (mut verifier_figures, mut noop_figures) = (vec![], vec![]);
        for round in 0..ROUNDS {
            let checked = slice(&with_verifier, &verifier, "/alerts/1");
            let baseline = slice(&with_noop, noop, "/alerts/1");
            let (checked, baseline) = in_turn(round, checked, baseline).await?;
            verifier_figures.push(checked);
            noop_figures.push(baseline);
        }
        let ratio = median(
            verifier_figures.iter().zip(&noop_figures).map(|(checked, baseline)| checked.cpu / baseline.cpu).collect(),
        );
        let unchecked = slice(&with_verifier, &verifier, "/public/1").await?;
        let row = Row { kind, verifier: medians(&verifier_figures), noop: medians(&noop_figures), unchecked, ratio };
        eprintln!(
            "{kind:?}: {:.0}/s, {:.1} us for each check, no-op {:.1} us, ratio {ratio:.2}",
            row.verifier.per_second, row.verifier.cpu, row.noop.cpu
        );
        rows.push(row);
    }
    Ok(rows)
}

/// The median of each figure.
fn medians(figures: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| median(figures.iter().map(field).collect());
    let time = |field: fn(&Figures) -> Duration| {
        let mut times: Vec<_> = figures.iter().map(field).collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    Figures { per_second: of(|f| f.per_second), p50: time(|f| f.p50), p99: time(|f| f.p99), cpu: of(|f| f.cpu) }
}

fn read(text: &str, used: Duration) -> Result<Figures> {
    ensure!(!text.contains("Non-2xx"), "not every request was allowed");
    let field = |name: &str| -> Result<&str> {
        let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix(name));
        line.map(str::trim).with_context(|| format!("the output of wrk lacks {name}"))
    };
    let time = |name: &str| -> Result<Duration> {
        let text = field(name)?;
        let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).context("no unit")?);
        let seconds: f64 = number.parse()?;
        Ok(match unit {
            "us" => Duration::from_secs_f64(seconds / 1e6),
            "ms" => Duration::from_secs_f64(seconds / 1e3),
            _ => Duration::from_secs_f64(seconds),
        })
    };
    let requests: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in ").map(|(count, _)| count))
        .context("no number of requests")?
        .parse()?;
    Ok(Figures {
        per_second: field("Requests/sec:")?.parse()?,
        p50: time("50%")?,
        p99: time("99%")?,
        cpu: used.as_secs_f64() * 1e6 / requests,
    })
}

/// Prints the results as a table.
pub fn print(rows: &[Row]) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "\nthrough proxies, {CONNECTIONS} connections of wrk, one worker for each proxy, all processes on the same cores:"
    );
    println!("| proxy | with | requests/s | p50 ms | p99 ms | server CPU us for each check | ratio |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
    for row in rows {
        let ratio = format!("{:.2}", row.ratio);
        for (with, figures, ratio) in
            [("verifier", &row.verifier, &*ratio), ("no-op server", &row.noop, ""), ("no check", &row.unchecked, "")]
        {
            let cpu = if with == "no check" { String::new() } else { format!("{:.1}", figures.cpu) };
            println!(
                "| {:?} | {with} | {:.0} | {:.2} | {:.2} | {cpu} | {ratio} |",
                row.kind,
                figures.per_second,
                ms(figures.p50),
                ms(figures.p99)
            );
        }
    }
}
