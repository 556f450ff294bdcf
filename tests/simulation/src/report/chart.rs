//! Line charts as inline SVG.

use std::fmt::Write;

use super::series::Line;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;

pub struct Curve {
    pub name: String,
    /// Number of its colour in the page's style.
    pub colour: usize,
    pub points: Line,
    /// Holds its value until the next point, as counts do.
    pub steps: bool,
}

pub struct Chart {
    pub title: String,
    pub curves: Vec<Curve>,
    /// A line to stay below, or above.
    pub goal: Option<f64>,
    /// Values above are cut off.
    pub most: Option<f64>,
    /// Where the axis begins; NaN for a round number below all values.
    pub least: f64,
    /// Seconds.
    pub duration: f64,
}

impl Chart {
    pub fn svg(&self) -> String {
        let values = self
            .curves
            .iter()
            .flat_map(|c| c.points.iter().map(|p| p.1));
        let least = if self.least.is_nan() {
            let lowest = (values.clone().chain(self.goal))
                .filter(|v| v.is_finite())
                .fold(f64::INFINITY, f64::min);
            (lowest / 10.0).floor() * 10.0
        } else {
            self.least
        };
        let top = (values.chain(self.goal))
            .filter(|v| v.is_finite())
            .fold(least, f64::max);
        let top = self.most.map_or(top, |most| top.min(most));
        let step = nice((top - least) / 4.0);
        let top = least + ((top - least) / step).ceil().max(1.0) * step;
        let scale = (TOP - HEIGHT + BOTTOM) / (top - least);
        let y = |v: f64| HEIGHT - BOTTOM + (v.clamp(least, top) - least) * scale;
        let x = |t: f64| LEFT + (WIDTH - LEFT - RIGHT) * (t / self.duration.max(1.0)).min(1.0);

        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(&self.title)
        );
        let mut grid = least;
        while grid <= top + step / 2.0 {
            let (left, right, at) = (LEFT, WIDTH - RIGHT, y(grid));
            let _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{left} {at:.1}H{right}\"/>\
                 <text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                left - 6.0,
                at + 4.0,
                number(grid)
            );
            grid += step;
        }
        let minutes = nice(self.duration / 60.0 / 8.0).max(1.0);
        let mut minute = 0.0;
        while minute * 60.0 <= self.duration {
            let (at, base) = (x(minute * 60.0), HEIGHT - 7.0);
            let _ = write!(
                svg,
                "<text class=\"x\" x=\"{at:.1}\" y=\"{base}\">{} min</text>",
                number(minute)
            );
            minute += minutes;
        }
        if let Some(goal) = self.goal {
            let at = y(goal);
            let _ = write!(
                svg,
                "<path class=\"goal\" d=\"M{LEFT} {at:.1}H{}\"/>",
                WIDTH - RIGHT
            );
        }
        for curve in &self.curves {
            let mut path = String::new();
            let mut pen = false;
            for &(t, value) in &curve.points {
                if !value.is_finite() {
                    pen = false;
                    continue;
                }
                let _ = if !pen {
                    write!(path, "M{:.1} {:.1}", x(t), y(value))
                } else if curve.steps {
                    write!(path, "H{:.1}V{:.1}", x(t), y(value))
                } else {
                    write!(path, "L{:.1} {:.1}", x(t), y(value))
                };
                pen = true;
            }
            let _ = write!(
                svg,
                "<path class=\"curve c{}\" d=\"{path}\"><title>{}</title></path>",
                curve.colour,
                escape(&curve.name)
            );
        }
        svg += "</svg>";
        svg
    }
}

/// The next of 1, 2, 5, 10, 20 ... that is no smaller.
fn nice(value: f64) -> f64 {
    if !(value.is_finite() && value > 0.0) {
        return 1.0;
    }
    let unit = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    let factor = steps.into_iter().find(|s| s * unit >= value * 0.999);
    factor.unwrap_or(10.0) * unit
}

fn number(value: f64) -> String {
    let rounded = (value * 1000.0).round() / 1000.0;
    format!("{}", if rounded == 0.0 { 0.0 } else { rounded })
}

pub fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_stay_within_the_frame_and_break_where_nothing_is_known() {
        let chart = Chart {
            title: "a < b".into(),
            curves: vec![Curve {
                name: "x".into(),
                colour: 1,
                points: vec![(0.0, 0.0), (30.0, 500.0), (60.0, f64::NAN), (90.0, 7.0)],
                steps: false,
            }],
            goal: Some(5.0),
            most: Some(10.0),
            least: 0.0,
            duration: 100.0,
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b"));
        assert_eq!(svg.matches("<path class=\"curve").count(), 1);
        let path = svg
            .split("c1\" d=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        assert_eq!(path.matches('M').count(), 2, "{path}");
        assert!(
            path.contains(&format!(" {TOP:.1}")),
            "500 is cut off at the top: {path}"
        );
    }

    #[test]
    fn grid_steps_are_round() {
        for (value, step) in [(0.3, 0.5), (1.0, 1.0), (1.1, 2.0), (23.0, 50.0), (0.0, 1.0)] {
            assert!((nice(value) - step).abs() < 1e-9, "{value}");
        }
    }
}
