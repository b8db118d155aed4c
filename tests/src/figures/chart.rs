//! Line charts, written as SVG by hand.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Told apart by the colour-blind too (Okabe, Ito), and by their dashes.
const COLOURS: [&str; 9] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
    "#8b4513",
];
const DASHES: [&str; 4] = ["", "7 3", "2 3", "9 3 2 3"];

/// One line.
#[derive(Clone, Debug)]
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A chart of several lines.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    x: String,
    y: String,
    /// Logarithmic y axis.
    log: bool,
    series: Vec<Series>,
}

/// Round numbers from 0 to `most`: 1, 2 or 5 times a power of ten apart, about six of them.
fn ticks(most: f64) -> Vec<f64> {
    let rough = (most / 6.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power);
    let step = step.filter(|step| *step >= rough).fold(f64::INFINITY, f64::min);
    (0..).map(|number| f64::from(number) * step).take_while(|tick| *tick <= most * 1.001).collect()
}

/// 1, 2, 5, 10, 20, 50 … up to the first that is at least `most`.
fn log_ticks(most: f64) -> Vec<f64> {
    let all = (0..12).flat_map(|power| [1.0, 2.0, 5.0].map(|times| times * 10f64.powi(power)));
    let mut ticks = Vec::new();
    for tick in all {
        ticks.push(tick);
        if tick >= most {
            break;
        }
    }
    ticks
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl Chart {
    /// A chart without lines.
    pub fn new(title: &str, x: &str, y: &str, log: bool) -> Self {
        let (title, x, y) = (title.to_owned(), x.to_owned(), y.to_owned());
        Self { title, x, y, log, series: Vec::new() }
    }

    /// Adds a line; its points in the order of x.
    pub fn line(&mut self, name: &str, points: Vec<(f64, f64)>) {
        self.series.push(Series { name: name.to_owned(), points });
    }

    fn most(&self, axis: fn(&(f64, f64)) -> f64) -> f64 {
        let values = self.series.iter().flat_map(|series| series.points.iter().map(axis));
        values.fold(1.0, f64::max)
    }

    fn scale_y(&self, value: f64, most: f64) -> f64 {
        let height = HEIGHT - TOP - BOTTOM;
        let part = if self.log { value.max(1.0).ln() / most.ln().max(1e-9) } else { value / most };
        HEIGHT - BOTTOM - part * height
    }

    /// The drawing.
    pub fn svg(&self) -> String {
        let x_most = self.most(|point| point.0);
        let y_ticks =
            if self.log { log_ticks(self.most(|p| p.1)) } else { ticks(self.most(|p| p.1)) };
        let y_most = self.most(|point| point.1).max(y_ticks.last().copied().unwrap_or(1.0));
        let scale_x = |value: f64| LEFT + value / x_most * (WIDTH - LEFT - RIGHT);
        let scale_y = |value: f64| self.scale_y(value, y_most);
        let (right, floor) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let mut parts = vec![format!(
            "<text x=\"{LEFT}\" y=\"22\" font-size=\"15\">{}</text>",
            escape(&self.title)
        )];
        for tick in &y_ticks {
            let y = scale_y(*tick);
            parts.push(format!(
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
                LEFT - 8.0,
                y + 4.0
            ));
        }
        for tick in ticks(x_most) {
            let x = scale_x(tick);
            let under = floor + 18.0;
            parts.push(format!(
                "<line x1=\"{x:.1}\" y1=\"{floor}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#888\"/>\
                 <text x=\"{x:.1}\" y=\"{under}\" text-anchor=\"middle\">{}</text>",
                floor + 4.0,
                (tick * 1000.0).round() / 1000.0
            ));
        }
        parts.push(format!(
            "<line x1=\"{LEFT}\" y1=\"{floor}\" x2=\"{right}\" y2=\"{floor}\" stroke=\"#888\"/>"
        ));
        let (middle_x, middle_y) = (f64::midpoint(LEFT, right), f64::midpoint(TOP, floor));
        parts.push(format!(
            "<text x=\"{middle_x}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text x=\"16\" y=\"{middle_y}\" text-anchor=\"middle\" \
             transform=\"rotate(-90 16 {middle_y})\">{}</text>",
            HEIGHT - 10.0,
            escape(&self.x),
            escape(&self.y)
        ));
        for (at, series) in self.series.iter().enumerate() {
            parts.push(draw(at, series, scale_x, scale_y));
        }
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n{}\n</svg>\n",
            parts.join("\n")
        )
    }

    /// Writes `NAME.svg`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(&self, out: &Path, name: &str) -> anyhow::Result<()> {
        let path = out.join(format!("{name}.svg"));
        std::fs::write(&path, self.svg()).with_context(|| format!("writing {}", path.display()))
    }
}

/// One line, its points and its entry in the legend.
fn draw(
    at: usize,
    series: &Series,
    scale_x: impl Fn(f64) -> f64,
    scale_y: impl Fn(f64) -> f64,
) -> String {
    let (colour, dash) = (COLOURS[at % COLOURS.len()], DASHES[at % DASHES.len()]);
    let (mut path, mut dots) = (String::new(), String::new());
    for (x, y) in &series.points {
        let (x, y) = (scale_x(*x), scale_y(*y));
        // Writing to a string cannot fail.
        let _ = write!(path, "{x:.1},{y:.1} ");
        let _ = write!(dots, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>");
    }
    let (x, y) = (WIDTH - RIGHT + 15.0, TOP + 10.0 + 20.0 * at as f64);
    format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
         stroke-dasharray=\"{dash}\"/>{dots}\
         <line x1=\"{x}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\" \
         stroke-dasharray=\"{dash}\"/><text x=\"{}\" y=\"{}\">{}</text>",
        path.trim_end(),
        x + 26.0,
        x + 32.0,
        y + 4.0,
        escape(&series.name)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover() {
        assert_eq!(ticks(12.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]);
        assert_eq!(ticks(1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(log_ticks(30.0), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }

    #[test]
    fn every_line_is_drawn_inside() {
        let mut chart = Chart::new("a < b", "x", "y", true);
        chart.line("one", vec![(0.0, 1.0), (10.0, 100.0)]);
        let svg = chart.svg();
        assert!(svg.contains("points=\"60.0,350.0 520.0,40.0\"") && svg.contains("a &lt; b"));
    }
}
