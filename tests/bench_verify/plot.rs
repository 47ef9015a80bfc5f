//! The figure in `docs/performance.md`: CPU time for each check by number of keys, and requests a second through each
//! proxy, both compared with the no-op server.

use std::fmt::Write;

use anyhow::Result;

use crate::{Row, proxied, support::repository};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 210.0;
const BAR: f64 = 16.0;
const COLORS: [&str; 3] = ["#2f6f9f", "#b8c4ce", "#e3e8ec"];

/// A group of bars.
struct Group {
    name: String,
    values: Vec<(&'static str, f64)>,
}

/// Writes `docs/images/verifier.svg`.
pub fn write(rows: &[Row], proxied: &[proxied::Row]) -> Result<()> {
    let cpu = rows.iter().flat_map(|row| {
        row.checks.iter().map(|checks| Group {
            name: format!("{:?}, {} keys", checks.protocol, row.keys),
            values: vec![("verifier", checks.cpu.0), ("no-op server", checks.cpu.1)],
        })
    });
    let through = proxied.iter().map(|row| Group {
        name: format!("{:?}", row.kind),
        values: vec![
            ("verifier", row.verifier.per_second),
            ("no-op server", row.noop.per_second),
            ("no check", row.unchecked.per_second),
        ],
    });
    let mut body = String::new();
    let mut y = 30.0;
    chart(
        &mut body,
        &mut y,
        "CPU time of the authorization server for each check, in microseconds",
        &cpu.collect::<Vec<_>>(),
    )?;
    chart(&mut body, &mut y, "Requests a second through a proxy with one worker", &through.collect::<Vec<_>>())?;
    let svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    );
    std::fs::create_dir_all(repository().join("docs/images"))?;
    std::fs::write(repository().join("docs/images/verifier.svg"), svg)?;
    Ok(())
}

fn chart(body: &mut String, y: &mut f64, title: &str, groups: &[Group]) -> Result<()> {
    let values = groups.iter().flat_map(|group| &group.values);
    let largest = values.map(|(_, value)| *value).fold(1.0, f64::max);
    writeln!(body, "<text x=\"20\" y=\"{y:.0}\" font-size=\"15\" font-weight=\"bold\">{title}</text>")?;
    *y += 14.0;
    for group in groups {
        writeln!(body, "<text x=\"20\" y=\"{:.0}\">{}</text>", *y + BAR, group.name)?;
        for ((label, value), color) in group.values.iter().zip(COLORS) {
            let width = value / largest * (WIDTH - LEFT - 190.0);
            let (top, text) = (*y + 3.0, *y + BAR - 1.0);
            writeln!(
                body,
                "<rect x=\"{LEFT}\" y=\"{top:.0}\" width=\"{width:.1}\" height=\"{:.0}\" fill=\"{color}\"/>\
                 <text x=\"{:.1}\" y=\"{text:.0}\">{} {label}</text>",
                BAR - 2.0,
                LEFT + width + 6.0,
                if *value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") },
            )?;
            *y += BAR;
        }
        *y += 8.0;
    }
    *y += 26.0;
    Ok(())
}
