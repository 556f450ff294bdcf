//! The page.

use std::fmt::Write;

use super::chart::{Chart, Curve, escape};
use super::series::{self, Line};
use super::{HEADER, Row, cells};
use crate::fleet::Outcome;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5c6b7a;--line:#d9e0e6;--paper:#fff;--mark:#eef6ff;
--c0:#0b6bcb;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#868e96;--c5:#e8a400}
@media(prefers-color-scheme:dark){:root{--ink:#e4eaf0;--soft:#9aa8b5;--line:#313c47;--paper:#12181f;
--mark:#17293b;--c0:#58a6ff;--c1:#ff8a5c;--c2:#5fd17a;--c3:#d68cf0;--c4:#9aa3ab;--c5:#ffcf4d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1180px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{color:var(--soft);max-width:75ch;margin:.3rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px;width:100%}
th,td{padding:.3rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600}th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
td.why{white-space:normal;text-align:left;min-width:24rem}
tr.ours{background:var(--mark);font-weight:600}td.no{color:var(--c1)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:.6rem 1.4rem}
@media(max-width:560px){.charts{grid-template-columns:1fr}}
figure{margin:0}figcaption{font-weight:600;font-size:14px;margin-bottom:.1rem}
.key{font-weight:400;color:var(--soft);margin-left:.7rem;white-space:nowrap}
.key i{display:inline-block;width:1.1em;border-top:3px solid;vertical-align:middle;margin-right:.3em}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}
.y{text-anchor:end}.x{text-anchor:middle}.grid{stroke:var(--line);fill:none}
.goal{stroke:var(--soft);stroke-dasharray:5 4;fill:none}
.curve{fill:none;stroke-width:1.7;stroke-linejoin:round}
.c0{stroke:var(--c0);stroke-width:2.4}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}
.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
";

/// What the charts show of a run.
struct Picture {
    title: &'static str,
    of: fn(&Outcome) -> Line,
    goal: fn(&Outcome) -> Option<f64>,
    most: Option<f64>,
    /// NaN for a round number below all values.
    least: f64,
    steps: bool,
}

const PICTURES: [Picture; 7] = [
    Picture {
        title: "Replicas (pods that are paid for)",
        of: |o| series::timeline(o, |p| f64::from(p.pods)),
        goal: |_| None,
        most: None,
        least: 0.0,
        steps: true,
    },
    Picture {
        title: "Good requests, % of those that arrived",
        of: series::good,
        goal: |o| Some(o.ledger.goals.good_percent),
        most: None,
        least: f64::NAN,
        steps: false,
    },
    Picture {
        title: "Time to first token, p95, s",
        of: series::ttft,
        goal: |o| Some(o.ledger.goals.ttft),
        most: Some(10.0),
        least: 0.0,
        steps: false,
    },
    Picture {
        title: "Inter-token latency, p95 of requests' means, ms",
        of: series::itl,
        goal: |o| Some(1e3 * o.ledger.goals.itl),
        most: Some(200.0),
        least: 0.0,
        steps: false,
    },
    Picture {
        title: "Dial: max_num_seqs",
        of: |o| series::timeline(o, |p| f64::from(p.dials.max_num_seqs)),
        goal: |_| None,
        most: None,
        least: 0.0,
        steps: true,
    },
    Picture {
        title: "Dial: max_num_batched_tokens",
        of: |o| series::timeline(o, |p| f64::from(p.dials.max_num_batched_tokens)),
        goal: |_| None,
        most: None,
        least: 0.0,
        steps: true,
    },
    Picture {
        title: "Requests waiting",
        of: |o| series::timeline(o, |p| f64::from(p.waiting)),
        goal: |_| None,
        most: None,
        least: 0.0,
        steps: true,
    },
];

/// A page with the table of all rows and charts of those in `drawn` (at most six; the first is
/// ours). `about` says in plain words what was run.
pub fn page(
    title: &str,
    about: &str,
    rows: &[Row],
    drawn: &[usize],
    oracle: Option<f64>,
) -> String {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style><h1>{0}</h1><p>{1}</p>",
        escape(title),
        escape(about)
    );
    html += "<h2>Side by side</h2><div class=\"scroll\"><table><tr>";
    for name in HEADER {
        let _ = write!(html, "<th>{name}</th>");
    }
    html += "</tr>";
    for row in rows {
        let ours = if row.name == "stoker" {
            " class=\"ours\""
        } else {
            ""
        };
        let _ = write!(html, "<tr{ours}>");
        let goal = row.outcome.ledger.goals.good_percent;
        let score = &row.outcome.score;
        for (column, cell) in cells(row, oracle).iter().enumerate() {
            let missed = (column == 2 && score.good < goal) || (column == 3 && score.strict < goal);
            let class = if missed { " class=\"no\"" } else { "" };
            let _ = write!(html, "<td{class}>{}</td>", escape(cell));
        }
        html += "</tr>";
    }
    html += "</table></div>";

    let drawn: Vec<&Row> = drawn
        .iter()
        .filter_map(|&place| rows.get(place))
        .take(6)
        .collect();
    let Some(first) = drawn.first() else {
        return html;
    };
    let end = |row: &&Row| row.outcome.timeline.last().map_or(0.0, |point| point.t);
    let duration = drawn.iter().map(end).fold(0.0, f64::max);
    html += "<h2>Over time</h2><div class=\"charts\">";
    let load = Chart {
        title: "Load, requests a second".into(),
        curves: vec![Curve {
            name: "arrivals".into(),
            colour: 4,
            points: series::load(&first.outcome),
            steps: false,
        }],
        goal: None,
        most: None,
        least: 0.0,
        duration,
    };
    figure(&mut html, &load);
    for picture in &PICTURES {
        let curve = |(colour, row): (usize, &&Row)| Curve {
            name: format!("{} {}", row.name, row.setting),
            colour,
            points: (picture.of)(&row.outcome),
            steps: picture.steps,
        };
        // Ours is drawn last, on top.
        let chart = Chart {
            title: picture.title.into(),
            curves: drawn.iter().enumerate().rev().map(curve).collect(),
            goal: (picture.goal)(&first.outcome),
            most: picture.most,
            least: picture.least,
            duration,
        };
        figure(&mut html, &chart);
    }
    html += "</div>";
    changes(&mut html, first);
    html
}

fn figure(html: &mut String, chart: &Chart) {
    let _ = write!(html, "<figure><figcaption>{}", escape(&chart.title));
    for curve in chart.curves.iter().rev() {
        let _ = write!(
            html,
            "<span class=\"key\"><i style=\"color:var(--c{})\"></i>{}</span>",
            curve.colour,
            escape(&curve.name)
        );
    }
    html.push_str("</figcaption>");
    html.push_str(&chart.svg());
    html.push_str("</figure>");
}

/// Every change that ours made, with its reason.
fn changes(html: &mut String, row: &Row) {
    let timeline = &row.outcome.timeline;
    let mut lines = String::new();
    for pair in timeline.windows(2) {
        let [before, after] = pair else { continue };
        if before.desired == after.desired && before.dials == after.dials {
            continue;
        }
        let Some(reason) = &after.reason else {
            continue;
        };
        let _ = write!(
            lines,
            "<tr><td>{:.1} min</td><td class=\"why\">{}</td><td>{} -&gt; {}</td><td>{} / {}</td></tr>",
            after.t / 60.0,
            escape(reason),
            before.desired,
            after.desired,
            after.dials.max_num_seqs,
            after.dials.max_num_batched_tokens
        );
    }
    if !lines.is_empty() {
        let _ = write!(
            html,
            "<h2>What {} did, and why</h2><div class=\"scroll\"><table><tr><th>when</th>\
             <th>reason</th><th>replicas</th><th>cap / budget</th></tr>{lines}</table></div>",
            escape(&row.name)
        );
    }
}
