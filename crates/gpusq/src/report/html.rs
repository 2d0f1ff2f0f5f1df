//! The page: plain HTML with its style sheet inside, made to be read on a phone first.

use std::fmt::Write;

use super::plot::{Line, Scale, plot, short};
use super::{Curve, LayerRow, Outcome, RunRecord, Sizes, bytes, fixed, grouped};

const STYLE: &str = include_str!("report.css");
/// Longer tables start folded.
const OPEN_ROWS: usize = 80;

macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{
        // Writing to a String cannot fail.
        let _ = write!($out, $($arg)*);
    }};
}
pub(super) use put;

/// `text` made safe inside elements and quoted attributes. Control characters, which neither HTML nor XML
/// allows, become the replacement character.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A weight's name, escaped, that breaks after its dots where a line is too short.
fn dotted(name: &str) -> String {
    escape(name).replace('.', ".<wbr/>")
}

/// A document called `title`, with the HTML that `body` appends to it.
pub(super) fn document(title: &str, body: impl FnOnce(&mut String)) -> String {
    let mut out = String::new();
    // The policy makes sure that nothing is ever fetched or run, whatever the record holds.
    put!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\
         <title>{0}</title><style>{STYLE}</style></head>\n<body><main><h1>{0}</h1>",
        escape(title)
    );
    body(&mut out);
    out.push_str("</main></body></html>\n");
    out
}

/// The document for `r`.
pub(super) fn page(r: &RunRecord) -> String {
    document(if r.title.is_empty() { "Compression run" } else { &r.title }, |out| {
        summary(out, r);
        scores(out, r);
        losses(out, r);
        layers(out, r);
        if let Some(sizes) = &r.sizes {
            sizes_section(out, sizes);
        }
        run(out, r);
    })
}

/// The first screen: what was compressed, whether it held, the scores side by side, the size.
fn summary(out: &mut String, r: &RunRecord) {
    let facts: Vec<String> =
        [&r.task, &r.variant].into_iter().filter(|s| !s.is_empty()).map(|s| escape(s)).collect();
    put!(out, "<p class=\"muted\">{}</p>", facts.join(" · "));

    let (outcome, text) = r.verdict();
    put!(out, "<p class=\"verdict {}\">{}", outcome.class(), escape(&text));
    let links: Vec<&str> = [
        (!r.curves.is_empty(), "<a href=\"#losses\">losses by term</a>"),
        (!r.layers.is_empty(), "<a href=\"#layers\">error by weight</a>"),
        (!r.ablation.is_empty(), "<a href=\"#scores\">ablation</a>"),
    ]
    .into_iter()
    .filter_map(|(present, link)| present.then_some(link))
    .collect();
    if outcome == Outcome::Lost && !links.is_empty() {
        put!(out, " See: {}.", links.join(", "));
    }
    out.push_str("</p>");

    if !r.stages.is_empty() {
        // Three fit side by side on a phone, more stand in pairs.
        put!(out, "<div class=\"cards{}\">", if r.stages.len() == 3 { " three" } else { "" });
        for (i, stage) in r.stages.iter().enumerate() {
            let score = r.main_score(&stage.scores);
            let change = match stage.one_class {
                true => "<span class=\"bad\">one class</span>".into(),
                false if i == 0 => "<span class=\"muted\">baseline</span>".into(),
                false => difference(r, score),
            };
            put!(
                out,
                "<div class=\"card\"><span>{}</span><strong>{}</strong><span class=\"muted\">{}</span>{change}</div>",
                escape(&stage.name),
                fixed(score, 2),
                escape(&r.main_metric),
            );
        }
        out.push_str("</div>");
    }
    if let Some(sizes) = &r.sizes {
        put!(
            out,
            "<p>Compressed weights: {} of FP16 became {}, <strong>{}</strong> of the bits. Whole model with scales and dense \
             rest: {}.</p>",
            bytes(sizes.dense_fp16_bits.div_ceil(8)),
            bytes(sizes.packed_bits.div_ceil(8)),
            percent(sizes.ratio(), 2),
            percent(sizes.model_ratio(), 1),
        );
    }
    if !r.notes.is_empty() {
        out.push_str("<h3>Notes</h3><ul>");
        for note in &r.notes {
            put!(out, "<li>{}</li>", escape(note));
        }
        out.push_str("</ul>");
    }
}

/// A main score's difference to the dense one: red if that is a loss, green if it is a gain.
fn difference(r: &RunRecord, score: f64) -> String {
    let dense = r.stages.first().map_or(f64::NAN, |dense| r.main_score(&dense.scores));
    let text = fixed(score - dense, 2);
    let plus = if score > dense && text != "0.00" { "+" } else { "" };
    let class = match r.outcome(score) {
        Outcome::Held if r.loss_to_dense(score) < 0.0 && text != "0.00" => "good",
        Outcome::Held | Outcome::Unknown => "muted",
        Outcome::Lost => "bad",
    };
    format!("<span class=\"{class}\">{plus}{text}</span>")
}

/// Every metric of every stage and ablation: the main one and its change first.
fn scores(out: &mut String, r: &RunRecord) {
    let all = || r.stages.iter().map(|s| &s.scores).chain(r.ablation.iter().map(|a| &a.scores)).flatten();
    if r.stages.is_empty() && r.ablation.is_empty() {
        return;
    }
    let mut others: Vec<&str> = Vec::new();
    for (name, _) in all() {
        if *name != r.main_metric && !others.contains(&name.as_str()) {
            others.push(name);
        }
    }
    let mut head = format!("<th class=\"num\">{}</th><th class=\"num\">Change</th>", escape(&r.main_metric));
    for name in &others {
        put!(head, "<th class=\"num\">{}</th>", escape(name));
    }
    let row = |out: &mut String, label: &str, scores: &[(String, f64)], baseline: bool| {
        let main = r.main_score(scores);
        let change = if baseline { String::new() } else { difference(r, main) };
        put!(out, "<tr><td>{}</td><td class=\"num\">{}</td>", escape(label), fixed(main, 2));
        put!(out, "<td class=\"num\">{change}</td>");
        for other in &others {
            let score = scores.iter().find(|(name, _)| name == other).map_or(f64::NAN, |s| s.1);
            put!(out, "<td class=\"num\">{}</td>", fixed(score, 2));
        }
    };
    out.push_str("<h2 id=\"scores\">Scores</h2>");
    if !r.stages.is_empty() {
        let more = "<th class=\"num\">Examples</th><th class=\"num\">Time</th>";
        open_table(out, "Scores", &format!("<th>Model</th>{head}{more}"));
        for (i, stage) in r.stages.iter().enumerate() {
            row(out, &stage.name, &stage.scores, i == 0);
            let (examples, time) = (grouped(stage.examples as u64), duration(stage.wall_seconds));
            put!(out, "<td class=\"num\">{examples}</td><td class=\"num\">{time}</td></tr>");
        }
        close_table(out);
    }
    if !r.ablation.is_empty() {
        out.push_str("<h3>Ablation</h3>");
        open_table(out, "Ablation", &format!("<th>Run</th>{head}"));
        for ablation in &r.ablation {
            row(out, &ablation.label, &ablation.scores, false);
            out.push_str("</tr>");
        }
        close_table(out);
    }
}

fn losses(out: &mut String, r: &RunRecord) {
    if r.curves.is_empty() {
        return;
    }
    out.push_str(
        "<h2 id=\"losses\">Losses by term</h2><p class=\"muted\">Total is what was minimised: the terms times their \
         weights. The terms are drawn before weighting.</p><div class=\"plots\">",
    );
    for curve in &r.curves {
        figure(out, curve);
    }
    out.push_str("</div>");
}

fn figure(out: &mut String, curve: &Curve) {
    let mut points = curve.points.clone();
    points.sort_by_key(|p| p.step);
    let line = |class, value: fn(&super::Point) -> f64| {
        let points: Vec<(f64, f64)> = points.iter().map(|p| (p.step as f64, value(p))).collect();
        Line { class, points }
    };
    // A term that is never more than 0 was not used.
    let used = |line: &Line| line.points.iter().any(|p| p.1.is_finite() && p.1 != 0.0);
    let mut lines = vec![line("hard", |p| p.hard), line("soft", |p| p.soft), line("feature", |p| p.feature)];
    lines.retain(used);
    lines.push(line("loss", |p| p.loss));

    put!(out, "<figure><h3>{}</h3>", escape(&curve.stage));
    if points.is_empty() {
        out.push_str("<p class=\"muted\">No steps were recorded.</p></figure>");
        return;
    }
    let drawn = plot(&format!("Loss by term over steps: {}", curve.stage), &lines, Scale::Wide, 220.0);
    out.push_str("<ul class=\"key\">");
    for (line, last) in lines.iter().zip(&drawn.last).rev() {
        let name = if line.class == "loss" { "total" } else { line.class };
        put!(
            out,
            "<li><svg viewBox=\"0 0 24 10\" aria-hidden=\"true\"><path class=\"line {}\" d=\"M0 5H24\"/></svg>{name} {}</li>",
            line.class,
            short(*last)
        );
    }
    put!(out, "</ul>{}", drawn.svg);
    let rate = line("lr", |p| p.lr);
    if used(&rate) {
        put!(
            out,
            "{}",
            plot(&format!("Learning rate over steps: {}", curve.stage), &[rate], Scale::Linear, 84.0).svg
        );
        out.push_str("<figcaption>Above: loss by step");
    } else {
        out.push_str("<figcaption>Loss by step");
    }
    out.push_str(if drawn.log { ", logarithmic. " } else { ". " });
    if used(&line("lr", |p| p.lr)) {
        out.push_str("Below: learning rate. ");
    }
    if drawn.smoothed {
        out.push_str("Faint: each step. Strong, and in the key: means. ");
    }
    let broken = points.iter().filter(|p| !p.loss.is_finite()).count();
    if broken > 0 {
        put!(
            out,
            "<span class=\"bad\">At {} of {} steps the loss was not a finite number.</span>",
            grouped(broken as u64),
            grouped(points.len() as u64)
        );
    }
    out.push_str("</figcaption></figure>");
}

fn layers(out: &mut String, r: &RunRecord) {
    if r.layers.is_empty() {
        return;
    }
    let (kept_dense, compressed): (Vec<&LayerRow>, Vec<&LayerRow>) =
        r.layers.iter().partition(|l| l.left_dense.is_some());
    put!(
        out,
        "<h2 id=\"layers\">Weights</h2><p>{} of {} GEMM weights are compressed.",
        compressed.len(),
        r.layers.len()
    );
    let worst = compressed
        .iter()
        .filter(|l| l.weight_error.is_finite())
        .max_by(|a, b| a.weight_error.total_cmp(&b.weight_error));
    if let Some(worst) = worst {
        put!(
            out,
            " Largest quantisation error: {} in {}.",
            percent(worst.weight_error, 2),
            escape(&worst.name)
        );
    }
    out.push_str("</p>");
    if !kept_dense.is_empty() {
        out.push_str("<h3>Left dense</h3>");
        open_table(out, "Weights left dense", "<th>Weight</th><th class=\"num\">Shape</th><th>Why</th>");
        for l in &kept_dense {
            let why = l.left_dense.as_deref().unwrap_or_default();
            put!(
                out,
                "<tr><td>{}</td><td class=\"num\">{} × {}</td><td class=\"wide\">{}</td></tr>",
                dotted(&l.name),
                l.rows,
                l.cols,
                escape(why)
            );
        }
        close_table(out);
    }
    if compressed.is_empty() {
        return;
    }
    let open = if compressed.len() <= OPEN_ROWS { " open=\"open\"" } else { "" };
    put!(
        out,
        "<details{open}><summary>All compressed weights</summary><p class=\"muted\">Error: root mean square of \
         the change by quantising, relative to the kept weights. Input step: size of one INT8 code of the input.</p>"
    );
    open_table(
        out,
        "Compressed weights",
        "<th>Weight</th><th>Error</th><th class=\"num\">Shape</th><th class=\"num\">Kept</th>\
         <th class=\"num\">Input step</th>",
    );
    let scale = worst.map_or(1.0, |l| l.weight_error).max(f64::MIN_POSITIVE);
    for l in compressed {
        put!(out, "<tr><td>{}</td><td>{}", dotted(&l.name), percent(l.weight_error, 2));
        if l.weight_error.is_finite() {
            let width = (100.0 * l.weight_error / scale).clamp(0.0, 100.0);
            put!(out, "<span class=\"bar\"><i style=\"width:{width:.1}%\"></i></span>");
        }
        put!(
            out,
            "</td><td class=\"num\">{} × {}</td><td class=\"num\">{}</td>",
            l.rows,
            l.cols,
            percent(l.kept, 1)
        );
        put!(out, "<td class=\"num\">{}</td></tr>", short(l.activation_scale));
    }
    close_table(out);
    out.push_str("</details>");
}

fn sizes_section(out: &mut String, s: &Sizes) {
    let dense = (s.dense_fp16_bits as f64 + s.rest_bits as f64).max(1.0);
    let of_bits = |bits: u64| bytes(bits.div_ceil(8));
    let packed = (s.packed_bits, of_bits(s.dense_fp16_bits), percent(s.ratio(), 2));
    let scales = (s.scale_bits, "–".into(), "–".into());
    let rest = (s.rest_bits, of_bits(s.rest_bits), "100 %".into());
    let rows = [
        ("packed", "Compressed weights: values and 2:4 indices", packed),
        ("scales", "Quantisation scales", scales),
        ("rest", "Dense rest as FP16: embeddings, norms, biases", rest),
    ];
    out.push_str(
        "<h2 id=\"sizes\">Sizes</h2><p class=\"muted\">The bar's full width is the whole model in FP16.</p>",
    );
    out.push_str("<div class=\"stack\">");
    for (class, _, (bits, ..)) in &rows {
        let width = (100.0 * *bits as f64 / dense).min(100.0);
        put!(out, "<i class=\"{class}\" style=\"width:{width:.2}%\"></i>");
    }
    out.push_str("</div>");
    open_table(
        out,
        "Sizes",
        "<th>Part</th><th class=\"num\">Dense FP16</th><th class=\"num\">Now</th><th class=\"num\">Bits</th>\
         <th class=\"num\">Ratio</th>",
    );
    let mut row = |label: &str, cells: [String; 4]| {
        put!(out, "<tr><td class=\"wide\">{label}</td>");
        for cell in cells {
            put!(out, "<td class=\"num\">{cell}</td>");
        }
        out.push_str("</tr>");
    };
    for (class, name, (bits, before, ratio)) in rows {
        let label = format!("<span class=\"swatch {class}\"></span>{name}");
        row(&label, [before, of_bits(bits), grouped(bits), ratio]);
    }
    let now = s.packed_bits.saturating_add(s.scale_bits).saturating_add(s.rest_bits);
    let before = s.dense_fp16_bits.saturating_add(s.rest_bits);
    row("Whole model", [of_bits(before), of_bits(now), grouped(now), percent(s.model_ratio(), 2)]);
    row("File on disk", [String::new(), bytes(s.file_bytes), String::new(), String::new()]);
    close_table(out);
}

/// What is needed to repeat the run.
pub(super) fn run(out: &mut String, r: &RunRecord) {
    out.push_str("<h2 id=\"run\">This run</h2><dl>");
    let threads = if r.machine.threads == 0 { String::new() } else { format!("{}", r.machine.threads) };
    let facts = [
        ("Started", r.started.clone()),
        ("Duration", if r.wall_seconds > 0.0 { duration(r.wall_seconds) } else { String::new() }),
        ("CPU", r.machine.cpu.clone()),
        ("Threads", threads),
        ("Device", r.machine.device.clone()),
        ("System", r.machine.os.clone()),
        ("Version", r.version.clone()),
    ];
    for (name, value) in facts.iter().filter(|f| !f.1.is_empty()) {
        put!(out, "<dt>{name}</dt><dd>{}</dd>", escape(value));
    }
    out.push_str("</dl>");
    for (name, text) in [("Command", &r.command), ("Configuration", &r.config)] {
        if !text.is_empty() {
            put!(
                out,
                "<details open=\"open\"><summary>{name}</summary><pre tabindex=\"0\">{}</pre></details>",
                escape(text)
            );
        }
    }
}

/// Begins a table that scrolls inside its own box. `head` is HTML.
pub(super) fn open_table(out: &mut String, label: &str, head: &str) {
    put!(
        out,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{label}\"><table><thead><tr>{head}</tr></thead><tbody>"
    );
}

pub(super) fn close_table(out: &mut String) {
    out.push_str("</tbody></table></div>");
}

fn percent(x: f64, digits: usize) -> String {
    let text = fixed(100.0 * x, digits);
    if x.is_nan() { text } else { format!("{text} %") }
}

fn duration(seconds: f64) -> String {
    let whole = seconds.round();
    match seconds {
        _ if !seconds.is_finite() || seconds < 0.0 => "–".into(),
        s if s < 9.95 => format!("{s:.1} s"),
        _ if whole < 60.0 => format!("{whole} s"),
        _ if whole < 3600.0 => format!("{} min {:02} s", (whole / 60.0).floor(), whole % 60.0),
        _ => format!("{} h {:02} min", (whole / 3600.0).floor(), ((whole % 3600.0) / 60.0).floor()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Ablation, Machine, Point, Stage, render};

    /// Parses the page as XML: every element closed and nested, every character allowed.
    fn parse(html: &str) -> roxmltree::Document<'_> {
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        roxmltree::Document::parse_with_options(html, options).expect("the page is well-formed")
    }

    /// All text a reader sees, without the style sheet.
    fn text(html: &str) -> String {
        let doc = parse(html);
        let body = doc.descendants().find(|n| n.has_tag_name("body")).unwrap();
        body.descendants().filter(|n| n.is_text()).filter_map(|n| n.text()).collect::<Vec<_>>().join("|")
    }

    /// A record with `s` in every text and every part present.
    fn full(s: &str) -> RunRecord {
        let s = || s.to_string();
        let stage = |name: String, score| Stage {
            name,
            scores: vec![(s(), score)],
            wall_seconds: 75.2,
            examples: 1234,
            one_class: false,
        };
        let point = |step, loss| Point { step, loss, hard: 0.5, soft: 0.0, feature: 0.25, lr: 1e-5 };
        let layer = LayerRow {
            name: s(),
            rows: 8,
            cols: 4,
            kept: 0.5,
            weight_error: 0.0123,
            activation_scale: 0.5,
            left_dense: None,
        };
        RunRecord {
            title: s(),
            task: s(),
            main_metric: s(),
            lower_is_better: false,
            variant: s(),
            started: s(),
            wall_seconds: 3725.0,
            machine: Machine { cpu: s(), threads: 2, os: s(), device: s() },
            version: s(),
            command: s(),
            stages: vec![stage(s(), 90.0), stage(s(), 87.0), stage(s(), 86.5)],
            curves: vec![Curve {
                stage: s(),
                points: vec![point(1, 0.7), point(0, 0.9), point(2, f64::NAN)],
            }],
            layers: vec![layer.clone(), LayerRow { left_dense: Some(s()), weight_error: f64::NAN, ..layer }],
            sizes: Some(Sizes {
                dense_fp16_bits: 3200,
                packed_bits: 1000,
                scale_bits: 64,
                rest_bits: 1600,
                file_bytes: 2_500_000,
            }),
            ablation: vec![Ablation { label: s(), scores: vec![(s(), 90.25)] }],
            config: s(),
            notes: vec![s()],
        }
    }

    #[test]
    fn text_from_outside_stays_text() {
        let hostile = "</title></style><script src=\"http://x/\">alert('1')</script>&amp;\u{0}\u{1b}<img onerror=\"x\" ]]> -->";
        let html = render(&full(hostile));
        let doc = parse(&html);
        let shown = hostile.replace(['\u{0}', '\u{1b}'], "\u{fffd}");
        for tag in ["title", "h1", "pre", "li", "h3"] {
            let found = doc.descendants().any(|n| n.has_tag_name(tag) && n.text() == Some(&shown));
            assert!(found, "<{tag}> holds the text as it is");
        }
        for node in doc.descendants().filter(|n| n.is_element()) {
            assert!(!["script", "img", "link", "iframe", "object", "base"].contains(&node.tag_name().name()));
            for a in node.attributes() {
                assert!(
                    !a.name().starts_with("on") && a.name() != "src",
                    "{} {}",
                    node.tag_name().name(),
                    a.name()
                );
                assert!(a.name() != "href" || a.value().starts_with('#'), "href {}", a.value());
            }
        }
    }

    #[test]
    fn the_style_sheet_fetches_nothing_and_cannot_end_early() {
        for forbidden in ["url(", "@import", "<", "&", "http"] {
            assert!(!STYLE.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn every_part_is_shown() {
        let html = render(&full("name"));
        let text = text(&html);
        for expected in [
            "name lost 3.50 points to name (86.50 against 90.00 name). The largest step down was name: 3.00 points.",
            "|90.00|",
            "|−3.00|",
            "|−3.50|",
            "|+0.25|",
            "|1,234|",
            "|1 min 15 s|",
            "|1 h 02 min|",
            "Above: loss by step. Below: learning rate. ",
            "At 1 of 3 steps the loss was not a finite number.",
            "1 of 2 GEMM weights are compressed.",
            "Largest quantisation error: 1.23 % in name.",
            "|8 × 4|",
            "|50.0 %|",
            "|31.25 %|",
            "|2.5 MB|",
            "|400 B|",
            "|1,000|",
            "|total 0.7|",
            "|feature 0.25|",
            "|hard 0.5|",
        ] {
            assert!(text.contains(expected), "{expected:?} in {text}");
        }
        assert!(!text.contains("soft "), "a term that is 0 throughout is not drawn: {text}");
        for id in ["scores", "losses", "layers", "sizes", "run"] {
            assert!(html.contains(&format!("<h2 id=\"{id}\">")), "{id}");
        }
    }

    #[test]
    fn missing_parts_are_left_out() {
        let html = render(&RunRecord::default());
        let shown = text(&html);
        assert!(
            shown.contains("Compression run") && shown.contains("No model was scored in this run."),
            "{shown}"
        );
        for id in ["scores", "losses", "layers", "sizes"] {
            assert!(!html.contains(&format!("id=\"{id}\"")), "{id}");
        }
        // Each part alone, and each alone missing.
        let whole = full("name");
        let cuts: [fn(&mut RunRecord); 6] = [
            |r| r.stages.clear(),
            |r| r.curves.clear(),
            |r| r.layers.clear(),
            |r| r.ablation.clear(),
            |r| r.sizes = None,
            |r| r.curves[0].points.clear(),
        ];
        for (i, cut) in cuts.iter().enumerate() {
            let mut less = whole.clone();
            cut(&mut less);
            assert!(parse(&render(&less)).root_element().has_children(), "without part {i}");
            assert_ne!(render(&less), render(&whole), "part {i} shows");
        }
    }

    #[test]
    fn numbers_that_are_not_numbers_show_as_a_dash() {
        let mut record = full("name");
        for stage in &mut record.stages {
            (stage.scores[0].1, stage.wall_seconds) = (f64::NAN, f64::NAN);
        }
        record.layers[0].weight_error = f64::NAN;
        record.layers[0].activation_scale = f64::INFINITY;
        record.sizes = Some(Sizes::default());
        let shown = text(&render(&record));
        assert!(shown.contains("No comparison with name: name has no usable name."), "{shown}");
        assert!(shown.contains("|–|") && shown.contains("|∞|"), "{shown}");
        assert!(!shown.contains("NaN") && !shown.contains("inf") && !shown.contains("-0"), "{shown}");
    }

    #[test]
    fn a_long_table_starts_folded() {
        let mut record = full("name");
        assert!(render(&record).contains("<details open=\"open\"><summary>All compressed weights"));
        record.layers = vec![record.layers[0].clone(); OPEN_ROWS + 1];
        assert!(render(&record).contains("<details><summary>All compressed weights"));
    }

    #[test]
    fn quantities_read_well() {
        let times = [0.04, 9.96, 59.6, 119.7, 3599.0, 3600.0, -1.0, f64::NAN].map(duration);
        assert_eq!(
            ["0.0 s", "10 s", "1 min 00 s", "2 min 00 s", "59 min 59 s", "1 h 00 min", "–", "–"],
            times
        );
    }
}
