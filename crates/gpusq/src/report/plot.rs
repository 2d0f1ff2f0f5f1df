//! Line plots as inline SVG.
//!
//! Written directly rather than with the `plotters` crate: its SVG backend writes fixed colours into each
//! element, so that a plot could not follow the page's light or dark scheme, and it draws every point it is
//! given. Here lines carry classes that the page's style sheet colours.

use std::fmt::Write;

/// One line of a plot: `class` chooses its colour, `points` are (x, y) in ascending x.
pub(super) struct Line {
    pub(super) class: &'static str,
    pub(super) points: Vec<(f64, f64)>,
}

// Drawing units; about a phone's width in CSS pixels, so that text keeps its size there.
const WIDTH: f64 = 360.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
/// Columns the points are gathered into: one a drawing unit.
const COLUMNS: usize = (WIDTH - LEFT - RIGHT) as usize;
/// Lines with more points than this are drawn faint, with their mean in as many windows on top.
const WINDOWS: usize = 60;
/// A logarithmic axis shows at most this many powers of ten below the largest value.
const DECADES: f64 = 6.0;

/// How an axis is laid over its values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    /// From the least value to the largest.
    Tight,
    /// Down to 0 where that costs less than half the axis.
    Linear,
    /// Logarithmic if no value is negative and the positive ones span more than a factor of 30, else linear.
    Wide,
}

/// One axis: its ends and its labelled ticks.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Holds all `values` (finite ones) with about `ticks` ticks.
    fn new(values: impl Iterator<Item = f64> + Clone, scale: Scale, ticks: usize) -> Self {
        let mut low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.clone().fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            return Axis { low: 0.0, high: 0.0, log: false, ticks: vec![] };
        }
        let least = values.filter(|&y| y > 0.0).fold(f64::INFINITY, f64::min);
        if scale == Scale::Wide && low >= 0.0 && high / least > 30.0 {
            return Self::logarithmic(least.max(high / 10f64.powf(DECADES)), high, ticks);
        }
        let largest = high.abs().max(low.abs());
        // Halved, here and in `place`, so that the difference of two huge values stays finite.
        if high / 2.0 - low / 2.0 <= 1e-9 * largest {
            return Axis { low, high: low, log: false, ticks: vec![(low, short(low))] };
        }
        if scale != Scale::Tight && low >= 0.0 && low < 0.5 * high {
            low = 0.0;
        }
        let rough = high / ticks as f64 - low / ticks as f64;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0].map(|m| m * unit).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * unit);
        // As many decimals as tell neighbours apart, unless powers of ten read better.
        let decimals = (-step.log10() + 1e-9).ceil().max(0.0) as usize;
        let plain = (0.01..1e4).contains(&largest) && decimals <= 5;
        let label = |t: f64| if plain { super::fixed(t, decimals) } else { short(t) };
        let first = (low / step - 1e-9).ceil();
        let ticks =
            (0..=2 * ticks).map(|i| (first + i as f64) * step).take_while(|t| *t <= high + 1e-9 * step);
        Axis { low, high, log: false, ticks: ticks.map(|t| (t, label(t))).collect() }
    }

    fn logarithmic(low: f64, high: f64, ticks: usize) -> Self {
        let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let inside = |t: &f64| *t >= low * 0.999 && *t <= high * 1.001;
        let powers: Vec<f64> = exponents.clone().map(|e| 10f64.powi(e)).filter(inside).collect();
        let list: Vec<f64> = match powers.len() {
            0..3 => exponents.flat_map(|e| [1.0, 3.0].map(|m| m * 10f64.powi(e))).filter(inside).collect(),
            n => powers.into_iter().step_by(n.div_ceil(ticks)).collect(),
        };
        Axis { low, high, log: true, ticks: list.into_iter().map(|t| (t, short(t))).collect() }
    }

    /// Where `value` lies between the axis's ends, 0 to 1; values outside lie on the nearer end.
    fn place(&self, value: f64) -> f64 {
        let at = match self.log {
            true => (value.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
            false if self.low == self.high => 0.5,
            false => (value / 2.0 - self.low / 2.0) / (self.high / 2.0 - self.low / 2.0),
        };
        at.clamp(0.0, 1.0)
    }
}

/// A drawn plot.
pub(super) struct Plot {
    /// The `<svg>` element.
    pub(super) svg: String,
    /// Whether the value axis is logarithmic.
    pub(super) log: bool,
    /// Whether some line is drawn as faint values with their windowed mean on top.
    pub(super) smoothed: bool,
    /// The last drawn value of each line (a mean where smoothed); NaN for a line without values.
    pub(super) last: Vec<f64>,
}

/// Draws `lines` into a plot `height` units high. `label`, plain text, is what a screen reader says. Values
/// that are not finite leave gaps.
pub(super) fn plot(label: &str, lines: &[Line], scale: Scale, height: f64) -> Plot {
    let shown = || lines.iter().flat_map(|line| &line.points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let x_axis = Axis::new(shown().map(|p| p.0), Scale::Tight, 5);
    let y_axis = Axis::new(shown().map(|p| p.1), scale, (height / 34.0).max(2.0) as usize);
    let px = |x: f64| LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT);
    let py = |y: f64| height - BOTTOM - y_axis.place(y) * (height - TOP - BOTTOM);

    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        super::html::escape(label)
    );
    for (tick, text) in &y_axis.ticks {
        let y = py(*tick);
        let _ = write!(svg, "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{}\"/>", WIDTH - RIGHT);
        let _ =
            write!(svg, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>", LEFT - 6.0, y + 4.0);
    }
    for (tick, text) in &x_axis.ticks {
        let (x, y) = (px(*tick), height - BOTTOM);
        // Labels at the right edge would be cut if they were centred.
        let anchor = if x > WIDTH - RIGHT - 14.0 { "end" } else { "middle" };
        let x_text = if anchor == "end" { x + RIGHT - 2.0 } else { x };
        let _ = write!(svg, "<path class=\"grid\" d=\"M{x:.1} {y}v4\"/>");
        let _ = write!(
            svg,
            "<text x=\"{x_text:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{text}</text>",
            y + 16.0
        );
    }
    let mut last = Vec::new();
    let mut smoothed = false;
    for line in lines {
        let many = line.points.len() > 2 * WINDOWS;
        let class = format!("{}{}", line.class, if many { " faint" } else { "" });
        trace(&mut svg, &class, &gather(&line.points, &x_axis, COLUMNS), Column::extremes, &px, &py);
        let mut end = line.points.iter().rev().map(|p| p.1).find(|y| y.is_finite()).unwrap_or(f64::NAN);
        if many {
            let windows = gather(&line.points, &x_axis, WINDOWS);
            trace(&mut svg, line.class, &windows, |c| vec![c.mean], &px, &py);
            end = windows.iter().rev().find(|c| c.count > 0.0).map_or(f64::NAN, |c| c.mean.1);
            smoothed = true;
        }
        last.push(end);
    }
    svg.push_str("</svg>");
    Plot { svg, log: y_axis.log, smoothed, last }
}

/// Scores of one model over several seeds, as a row of [`dots`].
pub(super) struct Mark {
    /// Chooses the colour.
    pub(super) class: &'static str,
    pub(super) points: Vec<f64>,
    pub(super) mean: f64,
    /// Half the length of the bar around the mean; not drawn where it is not finite.
    pub(super) spread: f64,
}

/// Height of a group's label and of each of its marks in [`dots`].
const LABEL: f64 = 18.0;
const MARK: f64 = 15.0;
/// Room beside the values of [`dots`], for half a tick's label.
const SIDE: f64 = 18.0;

/// Draws groups of marks below each other, each group under its name, over one axis of values. `reference` is
/// what all are compared to: a line with its spread as a band. `label`, plain text, is what a screen reader says.
pub(super) fn dots(label: &str, reference: &Mark, groups: &[(&str, Vec<Mark>)]) -> String {
    let all = || std::iter::once(reference).chain(groups.iter().flat_map(|(_, marks)| marks));
    let ends = |m: &Mark| [m.mean - m.spread, m.mean, m.mean + m.spread];
    let values = all().flat_map(|m| ends(m).into_iter().chain(m.points.iter().copied()));
    let values: Vec<f64> = values.filter(|x| x.is_finite()).collect();
    let axis = Axis::new(values.iter().copied(), Scale::Tight, 5);
    let px = |x: f64| SIDE + axis.place(x) * (WIDTH - 2.0 * SIDE);
    let rows: f64 = groups.iter().map(|(_, marks)| LABEL + MARK * marks.len() as f64 + 6.0).sum();
    let (bottom, height) = (TOP + rows, TOP + rows + BOTTOM);

    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        super::html::escape(label)
    );
    if reference.spread.is_finite() && reference.mean.is_finite() {
        let [low, _, high] = ends(reference).map(px);
        let _ = write!(
            svg,
            "<rect class=\"band\" x=\"{low:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{rows}\"/>",
            high - low
        );
    }
    for (tick, text) in &axis.ticks {
        let x = px(*tick);
        let _ = write!(svg, "<path class=\"grid\" d=\"M{x:.1} {TOP}V{}\"/>", bottom + 4.0);
        let y = bottom + 18.0;
        let _ = write!(svg, "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{text}</text>");
    }
    if reference.mean.is_finite() {
        let x = px(reference.mean);
        let _ = write!(svg, "<path class=\"line {}\" d=\"M{x:.1} {TOP}V{bottom}\"/>", reference.class);
    }
    let mut y = TOP;
    for (name, marks) in groups {
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"2\" y=\"{}\">{}</text>",
            y + 13.0,
            super::html::escape(name)
        );
        y += LABEL;
        for m in marks {
            let at = y + MARK / 2.0;
            if m.mean.is_finite() && m.spread.is_finite() {
                let [low, _, high] = ends(m).map(px);
                let _ = write!(svg, "<path class=\"line {}\" d=\"M{low:.1} {at}H{high:.1}\"/>", m.class);
            }
            for x in m.points.iter().filter(|x| x.is_finite()) {
                let _ = write!(
                    svg,
                    "<circle class=\"one {}\" cx=\"{:.1}\" cy=\"{at}\" r=\"2\"/>",
                    m.class,
                    px(*x)
                );
            }
            if m.mean.is_finite() {
                let _ = write!(
                    svg,
                    "<circle class=\"{}\" cx=\"{:.1}\" cy=\"{at}\" r=\"4\"/>",
                    m.class,
                    px(m.mean)
                );
            }
            y += MARK;
        }
        y += 6.0;
    }
    svg.push_str("</svg>");
    svg
}

/// The points that fall into one column of the drawing.
#[derive(Clone, Copy)]
struct Column {
    index: usize,
    /// Number of finite values; if 0, the points below mean nothing and the line breaks here.
    count: f64,
    low: (f64, f64),
    high: (f64, f64),
    mean: (f64, f64),
}

impl Column {
    fn add(&mut self, (x, y): (f64, f64)) {
        if !y.is_finite() {
            return;
        }
        self.count += 1.0;
        if self.count == 1.0 {
            (self.low, self.high, self.mean) = ((x, y), (x, y), (x, y));
            return;
        }
        self.mean.0 += (x - self.mean.0) / self.count;
        self.mean.1 += (y - self.mean.1) / self.count;
        self.low = if y < self.low.1 { (x, y) } else { self.low };
        self.high = if y > self.high.1 { (x, y) } else { self.high };
    }

    /// The lowest and the highest point in the order they came; one if they are the same.
    fn extremes(&self) -> Vec<(f64, f64)> {
        match (self.low, self.high) {
            (low, high) if low == high => vec![low],
            (low, high) if low.0 <= high.0 => vec![low, high],
            (low, high) => vec![high, low],
        }
    }
}

/// Gathers `points` into at most `columns` columns, so that a drawing does not grow with them. Columns that no point
/// falls into are left out.
fn gather(points: &[(f64, f64)], axis: &Axis, columns: usize) -> Vec<Column> {
    let mut list: Vec<Column> = Vec::new();
    for &point in points.iter().filter(|p| p.0.is_finite()) {
        let index = ((axis.place(point.0) * columns as f64) as usize).min(columns - 1);
        if list.last().is_none_or(|c| c.index != index) {
            list.push(Column { index, count: 0.0, low: (0.0, 0.0), high: (0.0, 0.0), mean: (0.0, 0.0) });
        }
        if let Some(column) = list.last_mut() {
            column.add(point);
        }
    }
    list
}

/// Appends the line through `points(column)` of each column; a part of a single point becomes a dot.
fn trace(
    svg: &mut String,
    class: &str,
    columns: &[Column],
    points: impl Fn(&Column) -> Vec<(f64, f64)>,
    px: &impl Fn(f64) -> f64,
    py: &impl Fn(f64) -> f64,
) {
    let parts =
        columns.split(|c| c.count == 0.0).map(|part| part.iter().flat_map(&points).collect::<Vec<_>>());
    let mut path = String::new();
    for part in parts {
        if let [(x, y)] = part[..] {
            let _ =
                write!(svg, "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"/>", px(x), py(y));
            continue;
        }
        for (i, (x, y)) in part.into_iter().enumerate() {
            let _ = write!(path, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, px(x), py(y));
        }
    }
    if !path.is_empty() {
        let _ = write!(svg, "<path class=\"line {class}\" d=\"{path}\"/>");
    }
}

/// A number in few characters, three digits at most: "0", "0.25", "12.3k", "2e−5".
pub(super) fn short(x: f64) -> String {
    let a = x.abs();
    if x == 0.0 || !x.is_finite() {
        return super::fixed(x, 0);
    }
    if !(1e-3..1e6).contains(&a) {
        return format!("{x:.1e}").replace(".0e", "e").replace('-', "−");
    }
    let (value, unit) = if a >= 1e4 { (x / 1e3, "k") } else { (x, "") };
    let decimals = (2.0 - value.abs().log10().floor()).max(0.0) as usize;
    let text = super::fixed(value, decimals);
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEIGHT: f64 = 220.0;

    fn draw(points: Vec<(f64, f64)>, scale: Scale) -> Plot {
        plot("label", &[Line { class: "loss", points }], scale, HEIGHT)
    }

    /// The d attribute of the first drawn line.
    fn path(svg: &str) -> &str {
        let after = svg.split("<path class=\"line").nth(1).expect("a line is drawn");
        after.split("d=\"").nth(1).and_then(|d| d.split('"').next()).unwrap()
    }

    /// The points of all drawn lines and dots.
    fn drawn(svg: &str) -> Vec<(f64, f64)> {
        let doc = roxmltree::Document::parse(svg).expect("well-formed");
        let mut points = Vec::new();
        for node in doc.descendants() {
            let class = node.attribute("class").unwrap_or_default();
            if node.has_tag_name("circle") {
                points
                    .push((node.attribute("cx").unwrap().into(), node.attribute("cy").unwrap().to_string()));
            } else if class.starts_with("line") {
                let path = node.attribute("d").unwrap();
                let pairs = path.split(['M', 'L']).filter(|p| !p.is_empty());
                points.extend(
                    pairs.map(|p| p.split_once(' ').unwrap()).map(|(x, y)| (x.to_string(), y.to_string())),
                );
            }
        }
        points.into_iter().map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
    }

    #[test]
    fn lines_keep_their_shape() {
        // A wide range of positive values is drawn on a logarithmic axis: equal ratios, equal distances.
        let plot = draw(vec![(0.0, 1000.0), (5.0, 10.0), (10.0, 0.1)], Scale::Wide);
        assert!(plot.log && !plot.smoothed && plot.last == [0.1]);
        assert_eq!(path(&plot.svg), "M46.0 10.0L197.0 103.0L348.0 196.0");
        assert!(
            ["0.1", "1", "10", "100", "1000"].iter().all(|t| plot.svg.contains(&format!(">{t}</text>"))),
            "{}",
            plot.svg
        );
        // The same values on an axis that stays linear.
        let plot = draw(vec![(0.0, 1000.0), (5.0, 10.0), (10.0, 0.1)], Scale::Linear);
        assert!(!plot.log);
        assert_eq!(path(&plot.svg), "M46.0 10.0L197.0 194.1L348.0 196.0");
        // Too narrow a range, or a negative value: linear.
        assert!(!draw(vec![(0.0, 1.0), (1.0, 29.0)], Scale::Wide).log);
        assert!(!draw(vec![(0.0, -0.001), (1.0, 1000.0)], Scale::Wide).log);
    }

    #[test]
    fn ticks_tell_close_values_apart() {
        let svg = draw(vec![(0.0, 0.5431), (12000.0, 0.5434)], Scale::Wide).svg;
        for tick in ["0.54310", "0.54315", "0.54340", "0", "5000", "10k"] {
            assert!(svg.contains(&format!(">{tick}</text>")), "{tick} in {svg}");
        }
    }

    #[test]
    fn values_that_are_not_finite_leave_gaps() {
        let y = [1.0, 2.0, f64::NAN, 3.0, 2.0, f64::INFINITY, 5.0, f64::NEG_INFINITY];
        let plot = draw(y.iter().enumerate().map(|(i, y)| (i as f64, *y)).collect(), Scale::Wide);
        assert_eq!(path(&plot.svg).matches('M').count(), 2, "{}", plot.svg);
        assert_eq!(plot.svg.matches("<circle").count(), 1, "a value alone between gaps is a dot");
        assert_eq!(plot.last, [5.0]);
    }

    #[test]
    fn nothing_to_draw_is_an_empty_plot() {
        for points in [vec![], vec![(0.0, f64::NAN)], vec![(f64::INFINITY, 1.0)]] {
            let plot = draw(points, Scale::Wide);
            assert!(drawn(&plot.svg).is_empty() && !plot.svg.contains("<text"), "{}", plot.svg);
        }
        let plot = plot("label", &[], Scale::Wide, HEIGHT);
        assert!(plot.last.is_empty() && drawn(&plot.svg).is_empty());
    }

    #[test]
    fn one_point_is_a_dot_in_the_middle() {
        let plot = draw(vec![(0.0, 0.0)], Scale::Wide);
        assert_eq!(drawn(&plot.svg), [(197.0, 103.0)]);
        assert_eq!(plot.svg.matches(">0</text>").count(), 2, "{}", plot.svg);
    }

    #[test]
    fn many_points_are_thinned_but_extremes_stay() {
        let mut points: Vec<_> = (0..100_000).map(|i| (i as f64, 1.0 + (i % 7) as f64 / 7.0)).collect();
        points[61_803].1 = 20.0;
        let plot = draw(points, Scale::Linear);
        assert!(plot.smoothed && plot.svg.len() < 16_000, "{} bytes", plot.svg.len());
        let top = drawn(&plot.svg).into_iter().find(|p| p.1 == TOP).expect("the spike reaches the top");
        assert!((top.0 - (46.0 + 302.0 * 0.61803)).abs() < 0.1, "{top:?}");
        assert!((plot.last[0] - 1.4285).abs() < 1e-2, "{:?}", plot.last);
    }

    #[test]
    fn short_numbers() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (1.0, "1"),
            (0.5, "0.5"),
            (0.012345, "0.0123"),
            (-2.5, "−2.5"),
            (123.4, "123"),
            (9999.0, "9999"),
            (12345.0, "12.3k"),
            (200_000.0, "200k"),
            (2e-5, "2e−5"),
            (1.25e7, "1.2e7"),
            (f64::NAN, "–"),
            (f64::INFINITY, "∞"),
        ];
        for (x, text) in cases {
            assert_eq!(short(x), text);
        }
    }

    #[test]
    fn dots_stand_at_their_values_and_gaps_stay_empty() {
        let mark =
            |mean, spread, points: &[f64]| Mark { class: "series0", points: points.to_vec(), mean, spread };
        let dense = Mark { class: "loss", ..mark(90.0, 1.0, &[]) };
        let groups = [
            ("one", vec![mark(85.0, 5.0, &[80.0, 90.0]), mark(82.5, f64::NAN, &[82.5])]),
            ("a < b", vec![mark(f64::NAN, f64::NAN, &[f64::NAN])]),
        ];
        let svg = dots("label", &dense, &groups);
        let doc = roxmltree::Document::parse(&svg).expect("well-formed");
        let all = |tag: &str, class: &str, name: &str| -> Vec<String> {
            let of = doc.descendants().filter(|n| n.has_tag_name(tag) && n.attribute("class") == Some(class));
            of.map(|n| n.attribute(name).unwrap().to_string()).collect()
        };
        // The axis goes from 80 to 91 over 324 units.
        let at = |x: f64| format!("{:.1}", 18.0 + 324.0 * (x - 80.0) / 11.0);
        assert_eq!(all("circle", "series0", "cx"), [at(85.0), at(82.5)]);
        assert_eq!(all("circle", "one series0", "cx"), [at(80.0), at(90.0), at(82.5)]);
        assert_eq!(all("path", "line series0", "d"), [format!("M{} 35.5H{}", at(80.0), at(90.0))]);
        assert_eq!(all("path", "line loss", "d"), [format!("M{} 10V103", at(90.0))]);
        assert_eq!(all("rect", "band", "x"), [at(89.0)]);
        let names: Vec<&str> = doc
            .descendants()
            .filter(|n| n.attribute("class") == Some("name"))
            .filter_map(|n| n.text())
            .collect();
        assert_eq!(names, ["one", "a < b"]);
        assert!(!svg.contains("NaN"));
        assert!(!dots("label", &mark(f64::NAN, f64::NAN, &[]), &[]).contains("NaN"));
    }

    proptest! {
        #[test]
        fn any_values_stay_inside(
            points in prop::collection::vec((any::<u64>(), any::<f64>()), 0..300),
            scale in prop::sample::select(vec![Scale::Tight, Scale::Linear, Scale::Wide]),
        ) {
            let mut points: Vec<(f64, f64)> = points.into_iter().map(|(x, y)| (x as f64, y)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let finite = points.iter().any(|p| p.1.is_finite());
            let plot = draw(points, scale);
            let drawn = drawn(&plot.svg);
            prop_assert_eq!(finite, !drawn.is_empty());
            for (x, y) in drawn {
                prop_assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y), "{x} {y}");
            }
            prop_assert!(!plot.svg.contains("NaN") && !plot.svg.contains("inf"), "{}", plot.svg);
        }
    }
}
