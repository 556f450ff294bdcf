//! A tolerant reader of the Prometheus text format.
//!
//! One bad line costs that line, never the scrape; names with ':' (vLLM's) are plain names; comments,
//! time stamps and OpenMetrics exemplars are passed over. Grammar:
//! <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>.

use std::borrow::Cow;

use stoker_autoscaler::Histogram;

/// One line of the exposition.
#[derive(Clone, Debug, PartialEq)]
pub struct Series<'a> {
    pub name: &'a str,
    pub labels: Vec<(&'a str, Cow<'a, str>)>,
    pub value: f64,
}

impl Series<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.as_ref())
    }
}

/// All readable lines of one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exposition<'a> {
    series: Vec<Series<'a>>,
    /// Lines that were neither blank nor comment nor a series.
    pub skipped: usize,
}

impl<'a> Exposition<'a> {
    pub fn parse(text: &'a str) -> Self {
        let mut exposition = Exposition::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match parse_line(line) {
                Some(series) => exposition.series.push(series),
                None => exposition.skipped += 1,
            }
        }
        exposition
    }

    /// Sum over the finite values of every series of this name whose labels have the given values;
    /// `None` where there is no such series.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.series
            .iter()
            .filter(|series| series.name == name && series.value.is_finite())
            .filter(|series| labels.iter().all(|(k, v)| series.label(k) == Some(v)))
            .map(|series| series.value)
            .reduce(|a, b| a + b)
    }

    /// The histogram of this base name, its label sets added up; `None` where it has no bucket.
    /// Bounds ascend, counts never fall from one bound to the next, the last bound is infinite.
    pub fn histogram(&self, name: &str) -> Option<Histogram> {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for series in &self.series {
            if series.name.strip_suffix("_bucket") != Some(name) || !series.value.is_finite() {
                continue;
            }
            let Some(bound) = series.label("le").and_then(parse_value) else {
                continue;
            };
            match buckets.iter_mut().find(|(le, _)| *le == bound) {
                Some((_, count)) => *count += series.value,
                None if bound.is_nan() => {}
                None => buckets.push((bound, series.value)),
            }
        }
        if buckets.is_empty() {
            return None;
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let count = self.sum(&format!("{name}_count"), &[]);
        if buckets.last().is_some_and(|(bound, _)| bound.is_finite()) {
            let total = count.unwrap_or_else(|| buckets.last().map_or(0.0, |last| last.1));
            buckets.push((f64::INFINITY, total));
        }
        let mut floor = 0.0_f64;
        for (_, in_bucket) in &mut buckets {
            floor = floor.max(*in_bucket);
            *in_bucket = floor;
        }
        Some(Histogram {
            sum: self.sum(&format!("{name}_sum"), &[]).unwrap_or(0.0),
            count: count.unwrap_or(floor),
            buckets,
        })
    }
}

fn parse_line(line: &str) -> Option<Series<'_>> {
    let name_end = line
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .unwrap_or(line.len());
    let (name, rest) = line.split_at(name_end);
    if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == ':') {
        return None;
    }
    let rest = rest.trim_start();
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inside) => parse_labels(inside)?,
        // Without labels a blank must end the name: `name-1` is no series.
        None if rest.len() == line.len() - name_end => return None,
        None => (Vec::new(), rest),
    };
    // What follows the value is a time stamp or an exemplar: neither is read.
    let value = parse_value(rest.split_ascii_whitespace().next()?)?;
    Some(Series {
        name,
        labels,
        value,
    })
}

type Labels<'a> = Vec<(&'a str, Cow<'a, str>)>;

/// `rest` begins behind the opening brace; gives the labels and what follows the closing brace.
fn parse_labels(mut rest: &str) -> Option<(Labels<'_>, &str)> {
    let mut labels = Vec::new();
    loop {
        rest = rest.trim_start();
        if let Some(behind) = rest.strip_prefix('}') {
            return Some((labels, behind));
        }
        let (name, behind) = rest.split_once('=')?;
        let inside = behind.trim_start().strip_prefix('"')?;
        let (value, behind) = parse_quoted(inside)?;
        labels.push((name.trim(), value));
        rest = behind.trim_start();
        match rest.strip_prefix(',') {
            Some(behind) => rest = behind,
            None if rest.starts_with('}') => {}
            None => return None,
        }
    }
}

/// `inside` begins behind the opening quote; gives the unescaped value and what follows the closing
/// quote.
fn parse_quoted(inside: &str) -> Option<(Cow<'_, str>, &str)> {
    let end = inside.find(['"', '\\'])?;
    if inside[end..].starts_with('"') {
        return Some((Cow::Borrowed(&inside[..end]), &inside[end + 1..]));
    }
    let mut value = String::with_capacity(inside.len());
    let mut chars = inside.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((Cow::Owned(value), &inside[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

/// Rust reads every spelling that Prometheus writes (`+Inf`, `NaN`, `1e-05`).
fn parse_value(text: &str) -> Option<f64> {
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_vllm_text() {
        let text = r#"# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \"b\" \\ c\nd"} 3.0
vllm:num_requests_running{engine="1",model_name="x,y}"} 2 1700000000000
process_start_time_seconds 1.7e+09
not a line at all {
broken{le="0.1} 4
vllm:ttft_bucket{le="0.1"} 4 # {trace_id="abc"} 0.05
vllm:ttft_bucket{le="+Inf"} 9
vllm:ttft_sum 1.25
vllm:ttft_count 9
"#;
        let exposition = Exposition::parse(text);
        assert_eq!(exposition.skipped, 2);
        assert_eq!(exposition.sum("vllm:num_requests_running", &[]), Some(5.0));
        assert_eq!(
            exposition.sum(
                "vllm:num_requests_running",
                &[("model_name", "a \"b\" \\ c\nd")]
            ),
            Some(3.0)
        );
        assert_eq!(
            exposition.sum("process_start_time_seconds", &[]),
            Some(1.7e9)
        );
        assert_eq!(
            exposition.histogram("vllm:ttft"),
            Some(Histogram {
                buckets: vec![(0.1, 4.0), (f64::INFINITY, 9.0)],
                sum: 1.25,
                count: 9.0
            })
        );
        assert_eq!(exposition.histogram("vllm:itl"), None);
    }

    #[test]
    fn histograms_of_several_engines_add_up_and_always_end_at_infinity() {
        let text = "h_bucket{engine=\"0\",le=\"1\"} 2\nh_bucket{engine=\"1\",le=\"1\"} 3\n\
                    h_bucket{engine=\"0\",le=\"0.5\"} 1\nh_bucket{le=\"NaN\"} 7\nh_count 8\nh_sum 4\n";
        let histogram = Exposition::parse(text).histogram("h").unwrap();
        assert_eq!(
            histogram.buckets,
            vec![(0.5, 1.0), (1.0, 5.0), (f64::INFINITY, 8.0)]
        );
    }

    #[test]
    fn values_that_are_not_numbers_do_not_spoil_a_sum() {
        let exposition = Exposition::parse("g NaN\ng{a=\"1\"} 2\nonly NaN\n");
        assert_eq!(exposition.sum("g", &[]), Some(2.0));
        assert_eq!(exposition.sum("only", &[]), None);
    }

    fn escape(value: &str) -> String {
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
    }

    proptest! {
        #[test]
        fn never_panics(text in "(?s).{0,400}") {
            let exposition = Exposition::parse(&text);
            let _ = exposition.histogram("a");
        }

        /// Text made of the format's own characters reaches the corners that random text doesn't.
        #[test]
        fn never_panics_on_near_misses(text in "[a\\{\\}=,\"\\\\#:0-9 \\n\\.eNI+-]{0,200}") {
            let exposition = Exposition::parse(&text);
            let _ = exposition.sum("a", &[("a", "a")]);
        }

        #[test]
        fn what_is_written_is_read_back(
            name in "[a-zA-Z_:][a-zA-Z0-9_:]{0,20}",
            labels in proptest::collection::btree_map("[a-z_][a-z0-9_]{0,8}", "[^\r]{0,12}", 0..4),
            value in proptest::num::f64::NORMAL,
            stamp in proptest::option::of(0_u64..2_000_000_000_000),
        ) {
            let inside: Vec<String> =
                labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
            let stamp = stamp.map(|t| format!(" {t}")).unwrap_or_default();
            let line = format!("{name}{{{}}} {value:e}{stamp}\n", inside.join(","));
            let exposition = Exposition::parse(&line);
            // Other line separators than \n inside a value would end the line.
            prop_assume!(line.lines().count() == 1);
            prop_assert_eq!(exposition.skipped, 0);
            let wanted: Vec<(&str, &str)> =
                labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            prop_assert_eq!(exposition.sum(&name, &wanted), Some(value));
        }

        #[test]
        fn a_bad_line_costs_only_itself(bad in "[^\n\r]{0,60}", before in 0_u32..1000, after in 0_u32..1000) {
            let text = format!("before {before}\n{bad}\nafter {after}\n");
            let exposition = Exposition::parse(&text);
            prop_assume!(!bad.contains("before") && !bad.contains("after"));
            prop_assert_eq!(exposition.sum("before", &[]), Some(f64::from(before)));
            prop_assert_eq!(exposition.sum("after", &[]), Some(f64::from(after)));
        }

        #[test]
        fn histograms_are_cumulative(counts in proptest::collection::vec((0.0_f64..10.0, -5.0_f64..50.0), 1..12)) {
            let text: String = counts.iter().map(|(le, n)| format!("h_bucket{{le=\"{le}\"}} {n}\n")).collect();
            let histogram = Exposition::parse(&text).histogram("h").unwrap();
            prop_assert!(histogram.buckets.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1));
            prop_assert_eq!(histogram.buckets.last().map(|b| b.0), Some(f64::INFINITY));
        }
    }
}
