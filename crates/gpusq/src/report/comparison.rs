//! Several models over several seeds, beside each other: `reproduce.json`, `table.md` and the page.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::html::{close_table, document, escape, open_table, put, run};
use super::plot::{Mark, dots};
use super::{Machine, Outcome, PAGE_FILE, RunRecord, Stage, fixed, write_together};
use crate::{Error, Result};

/// Scores of runs that differ in their settings, each repeated with several seeds. Numbers that are not finite
/// are `null` in `reproduce.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// Name of the experiment, the page's title.
    pub experiment: String,
    /// What it compares.
    pub about: String,
    /// What was compressed.
    pub model: String,
    /// The task's name.
    pub task: String,
    /// Which of the scores decides.
    pub main_metric: String,
    /// Whether a smaller main score is better.
    pub lower_is_better: bool,
    /// The seeds that were asked for.
    pub seeds: Vec<u64>,
    /// What `spread` is in this record.
    pub spread: String,
    /// Runs there will be; more than `runs` while the experiment goes on.
    pub planned: usize,
    /// One for each model: the dense one first, then those of each variant in the order they are made.
    pub rows: Vec<Row>,
    /// Every finished run.
    pub runs: Vec<SeedRun>,
    /// When the first run began, RFC 3339.
    pub started: String,
    /// Where it ran.
    pub machine: Machine,
    /// Version of the program.
    pub version: String,
    /// The command line that repeats all of it.
    pub command: String,
    /// The settings that all runs share, TOML text; what a run changes is in [`SeedRun::settings`].
    pub config: String,
    /// Remarks for the reader, plain text.
    pub notes: Vec<String>,
}

/// One model over its seeds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Name of the variant it belongs to; "dense" for the dense model.
    pub variant: String,
    /// The same for people.
    pub label: String,
    /// Which of the variant's models it is, a [`Stage::name`].
    pub stage: String,
    /// Seeds its scores are of, in the order of [`Summary::values`].
    pub seeds: Vec<u64>,
    /// The metrics, the main one first.
    pub metrics: Vec<Measured>,
    /// Seeds with which it put all examples into one class.
    pub one_class: usize,
    /// Whether it kept the dense model's main score; nothing to say of the dense model itself.
    pub outcome: Outcome,
    /// The same as a sentence; empty for the dense model.
    pub verdict: String,
}

/// One metric of a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// The metric's name.
    pub name: String,
    /// The scores.
    pub score: Summary,
    /// Their differences to the dense model of the same seed; `None` for the dense model.
    pub difference: Option<Summary>,
}

/// Values, one for each seed, and what they come to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The values.
    pub values: Vec<f64>,
    /// Their mean; NaN if there are none.
    pub mean: f64,
    /// Their sample standard deviation (divided by n - 1); NaN if there are fewer than two.
    pub spread: f64,
    /// The least of them.
    pub low: f64,
    /// The largest.
    pub high: f64,
}

/// One finished run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SeedRun {
    /// Its seed.
    pub seed: u64,
    /// Its variant, as in [`Row::variant`].
    pub variant: String,
    /// Settings in which it differs from [`Comparison::config`], apart from the seed.
    pub settings: Vec<(String, String)>,
    /// Its folder in the experiment's, where its own report is.
    pub folder: String,
    /// Seconds it took.
    pub wall_seconds: f64,
    /// What it scored; the first is the dense model.
    pub stages: Vec<Stage>,
}

impl Row {
    /// The variant and which of its models.
    fn name(&self) -> String {
        if self.stage.is_empty() { self.label.clone() } else { format!("{} · {}", self.label, self.stage) }
    }
}

/// `90.12 ± 0.34`; without a spread where none is known.
fn spread(s: &Summary, signed: bool) -> String {
    let mean = fixed(s.mean, 2);
    let plus = if signed && s.mean > 0.0 && mean != "0.00" { "+" } else { "" };
    match s.spread.is_finite() {
        true => format!("{plus}{mean} ± {}", fixed(s.spread, 2)),
        false => format!("{plus}{mean}"),
    }
}

impl Comparison {
    /// Heads of the columns, the first of which is text and the others numbers.
    fn head(&self) -> Vec<String> {
        let metrics = self.rows.first().map_or(&[][..], |r| &r.metrics);
        let mut head = vec!["Model".to_string()];
        head.extend(metrics.iter().flat_map(|m| [m.name.clone(), format!("Δ {}", m.name)]));
        head.push("Seeds".into());
        head
    }

    /// The row's cells under [`Comparison::head`].
    fn cells(&self, row: &Row) -> Vec<String> {
        let one_class = if row.one_class > 0 { " (one class)" } else { "" };
        let mut cells = vec![row.name() + one_class];
        for m in &row.metrics {
            cells.push(spread(&m.score, false));
            cells.push(m.difference.as_ref().map_or(String::new(), |d| spread(d, true)));
        }
        cells.push(row.seeds.len().to_string());
        cells
    }

    /// What was run on what, in one line.
    fn facts(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        let seeds = format!("{} {}", if seeds.len() == 1 { "seed" } else { "seeds" }, seeds.join(", "));
        let going = match self.runs.len() < self.planned {
            true => format!(" · so far {} of {} runs", self.runs.len(), self.planned),
            false => String::new(),
        };
        format!("{} · {seeds}{going}", self.model)
    }

    fn title(&self) -> String {
        format!("{}: {}", self.experiment, self.task)
    }

    /// How to read the table.
    fn legend(&self) -> String {
        format!(
            "Mean over the seeds ± {}. Δ: the same of the differences to the dense model of the same seed.",
            self.spread
        )
    }

    /// How many compressed models kept the dense score, with the outcome of all together.
    pub fn verdict(&self) -> (Outcome, String) {
        let judged: Vec<Outcome> =
            self.rows.iter().filter(|r| !r.verdict.is_empty()).map(|r| r.outcome).collect();
        let count = |o: Outcome| judged.iter().filter(|j| **j == o).count();
        let (held, lost, unknown) = (count(Outcome::Held), count(Outcome::Lost), count(Outcome::Unknown));
        match (judged.len(), unknown) {
            (0, _) => (Outcome::Unknown, "No compressed model was scored yet.".into()),
            (all, 1..) if unknown == all => {
                (Outcome::Unknown, "Nothing can be said of the compressed models.".into())
            }
            (all, _) => {
                let unknown =
                    if unknown > 0 { format!(", of {unknown} nothing can be said") } else { String::new() };
                let outcome = match (lost, held) {
                    (0, n) if n == all => Outcome::Held,
                    (0, _) => Outcome::Unknown,
                    _ => Outcome::Lost,
                };
                let models = if all == 1 { "model" } else { "models" };
                let text = format!(
                    "{held} of {all} compressed {models} kept the dense {}, {lost} fell below it by more than the spread over \
                     seeds{unknown}.",
                    self.main_metric
                );
                (outcome, text)
            }
        }
    }

    /// The table with the verdicts, as Markdown.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}\n\n{}\n\n{}\n\n", self.title(), self.about, self.facts());
        // A bar would end the cell.
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let cell = |text: String| text.replace('|', "\\|");
        let head: Vec<String> = self.head().into_iter().map(cell).collect();
        let rule = format!("|---|{}\n", "---:|".repeat(head.len() - 1));
        out += &(line(head) + &rule);
        for row in &self.rows {
            out += &line(self.cells(row).into_iter().map(cell).collect());
        }
        put!(out, "\n{}\n\n{}\n\n", self.legend(), self.verdict().1);
        for row in self.rows.iter().filter(|r| !r.verdict.is_empty()) {
            put!(out, "- {}: {}\n", row.name(), row.verdict);
        }
        for (i, note) in self.notes.iter().enumerate() {
            put!(out, "{}- Note: {note}\n", if i == 0 { "\n" } else { "" });
        }
        out
    }

    /// The page: one HTML document (also well-formed XML) that needs nothing beside itself.
    pub fn page(&self) -> String {
        document(&self.title(), |out| {
            put!(out, "<p class=\"muted\">{}</p><p>{}</p>", escape(&self.facts()), escape(&self.about));
            let (outcome, text) = self.verdict();
            put!(out, "<p class=\"verdict {}\">{}</p>", outcome.class(), escape(&text));
            self.verdicts(out);
            if !self.rows.is_empty() {
                self.figures(out);
                self.table(out);
                self.singles(out);
            }
            let known = RunRecord {
                started: self.started.clone(),
                wall_seconds: self.runs.iter().map(|r| r.wall_seconds).sum(),
                machine: self.machine.clone(),
                version: self.version.clone(),
                command: self.command.clone(),
                config: self.config.clone(),
                ..RunRecord::default()
            };
            run(out, &known);
        })
    }

    fn verdicts(&self, out: &mut String) {
        let rows: Vec<&Row> = self.rows.iter().filter(|r| !r.verdict.is_empty()).collect();
        if rows.is_empty() && self.notes.is_empty() {
            return;
        }
        out.push_str("<ul>");
        for row in rows {
            let (name, class) = (escape(&row.name()), row.outcome.class());
            put!(out, "<li>{name}: <span class=\"{class}\">{}</span></li>", escape(&row.verdict));
        }
        for note in &self.notes {
            put!(out, "<li class=\"muted\">{}</li>", escape(note));
        }
        out.push_str("</ul>");
    }

    /// The main scores and their differences to dense.
    fn figures(&self, out: &mut String) {
        put!(out, "<h2 id=\"plot\">{}</h2><div class=\"plots\">", escape(&self.main_metric));
        self.figure(out, "Score", |m| Some(&m.score));
        self.figure(out, "Difference to dense of the same seed", |m| m.difference.as_ref());
        put!(
            out,
            "</div><p class=\"muted\">Large: mean, with the {} as a bar. Small: each seed. Upright: the dense model, with its \
             own as a band.</p>",
            escape(&self.spread)
        );
    }

    /// `what` of the main metric, one group for each variant.
    fn figure(&self, out: &mut String, title: &str, what: fn(&Measured) -> Option<&Summary>) {
        const CLASSES: [&str; 3] = ["series0", "series1", "series2"];
        let Some((dense, compressed)) = self.rows.split_first() else { return };
        let mark = |row: &Row, class| match row.metrics.first().and_then(what) {
            Some(s) => Mark { class, points: s.values.clone(), mean: s.mean, spread: s.spread },
            // Only the dense model has no difference: it is what the others differ from.
            None => Mark { class, points: vec![], mean: 0.0, spread: f64::NAN },
        };
        let mut stages: Vec<&str> = Vec::new();
        let mut groups: Vec<(&str, Vec<Mark>)> = Vec::new();
        for row in compressed {
            let known = stages.iter().position(|s| *s == row.stage);
            let place = known.unwrap_or_else(|| {
                stages.push(&row.stage);
                stages.len() - 1
            });
            let mark = mark(row, CLASSES[place % CLASSES.len()]);
            match groups.last_mut().filter(|(name, _)| *name == row.label) {
                Some((_, marks)) => marks.push(mark),
                None => groups.push((&row.label, vec![mark])),
            }
        }
        put!(out, "<figure><h3>{title}</h3><ul class=\"key\">");
        let names = stages.iter().enumerate().map(|(i, s)| (CLASSES[i % CLASSES.len()], *s));
        for (class, name) in std::iter::once(("loss", dense.label.as_str())).chain(names) {
            let dot = match class {
                "loss" => String::new(),
                _ => format!("<circle class=\"{class}\" cx=\"12\" cy=\"5\" r=\"4\"/>"),
            };
            put!(
                out,
                "<li><svg viewBox=\"0 0 24 10\" aria-hidden=\"true\"><path class=\"line {class}\" d=\"M0 5H24\"/>{dot}</svg>{}</li>",
                escape(name)
            );
        }
        let label = format!("{}: {title} of each model, with its spread over seeds", self.main_metric);
        put!(out, "</ul>{}</figure>", dots(&label, &mark(dense, "loss"), &groups));
    }

    fn table(&self, out: &mut String) {
        out.push_str("<h2 id=\"scores\">Scores</h2>");
        let head = self.head();
        let number = |text: &String| format!("<th class=\"num\">{}</th>", escape(text));
        let numbers: String = head[1..].iter().map(number).collect();
        open_table(out, "Scores", &format!("<th>{}</th>{numbers}", head[0]));
        for row in &self.rows {
            let cells = self.cells(row);
            put!(out, "<tr><td>{}</td>", escape(&cells[0]));
            for cell in &cells[1..] {
                put!(out, "<td class=\"num\">{}</td>", escape(cell));
            }
            out.push_str("</tr>");
        }
        close_table(out);
        put!(out, "<p class=\"muted\">{}</p>", escape(&self.legend()));
    }

    /// The main score of every run.
    fn singles(&self, out: &mut String) {
        put!(out, "<details><summary>{}, each seed</summary>", escape(&self.main_metric));
        let number = |seed: &u64| format!("<th class=\"num\">seed {seed}</th>");
        let seeds: String = self.seeds.iter().map(number).collect();
        open_table(out, "Each seed", &format!("<th>Model</th>{seeds}"));
        for row in &self.rows {
            put!(out, "<tr><td>{}</td>", escape(&row.name()));
            for seed in &self.seeds {
                let at = row.seeds.iter().position(|s| s == seed);
                let value = at.and_then(|i| row.metrics.first()?.score.values.get(i));
                put!(out, "<td class=\"num\">{}</td>", value.map_or("–".into(), |x| fixed(*x, 2)));
            }
            out.push_str("</tr>");
        }
        close_table(out);
        out.push_str("<p class=\"muted\">Each run has a report of its own in its folder: ");
        let folders: Vec<String> = self.runs.iter().map(|r| escape(&r.folder)).collect();
        put!(out, "{}.</p></details>", folders.join(", "));
    }
}

/// File of a [`Comparison`] in its output folder.
pub const COMPARISON_FILE: &str = "reproduce.json";
/// Its table as Markdown, beside it.
pub const TABLE_FILE: &str = "table.md";

/// Writes `reproduce.json`, `table.md` and `report.html` into the folder `dir`, as [`super::write()`] does.
///
/// # Errors
/// What writing meets.
pub fn write_comparison(c: &Comparison, dir: &Path) -> Result<()> {
    let file = dir.join(COMPARISON_FILE);
    let json = serde_json::to_vec_pretty(c).map_err(|e| Error::file(&file, e.to_string()))?;
    let (table, page) = (c.markdown().into_bytes(), c.page().into_bytes());
    write_together(dir, [(PAGE_FILE, page), (TABLE_FILE, table), (COMPARISON_FILE, json)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(values: &[f64], mean: f64, spread: f64) -> Summary {
        Summary { values: values.to_vec(), mean, spread, low: f64::NAN, high: f64::NAN }
    }

    /// A dense model and one variant with two models, over two seeds, with `s` in every text.
    fn comparison(s: &str) -> Comparison {
        let s = || s.to_string();
        let row = |variant: &str, stage: &str, score: Summary, difference: Option<Summary>, outcome| Row {
            variant: variant.into(),
            label: format!("{variant}{}", s()),
            stage: stage.into(),
            seeds: vec![4, 5],
            metrics: vec![
                Measured { name: format!("accuracy{}", s()), score, difference },
                Measured {
                    name: "f1".into(),
                    score: summary(&[f64::NAN; 2], f64::NAN, f64::NAN),
                    difference: None,
                },
            ],
            one_class: 0,
            outcome,
            verdict: if outcome == Outcome::Unknown { String::new() } else { format!("a verdict{}", s()) },
        };
        Comparison {
            experiment: s(),
            about: s(),
            model: s(),
            task: s(),
            main_metric: format!("accuracy{}", s()),
            seeds: vec![4, 5],
            spread: "standard deviation".into(),
            planned: 4,
            rows: vec![
                row("dense", "", summary(&[90.0, 92.0], 91.0, 1.414), None, Outcome::Unknown),
                row(
                    "gemm",
                    "FP16",
                    summary(&[91.0, 93.0], 92.0, 1.414),
                    Some(summary(&[1.0, 1.0], 1.0, 0.0)),
                    Outcome::Held,
                ),
                row(
                    "gemm",
                    "INT8",
                    summary(&[88.0, 91.0], 89.5, 2.121),
                    Some(summary(&[-2.0, -1.0], -1.5, 0.707)),
                    Outcome::Lost,
                ),
            ],
            runs: vec![SeedRun { folder: s(), variant: s(), ..SeedRun::default() }],
            started: s(),
            version: s(),
            command: s(),
            config: s(),
            notes: vec![s()],
            ..Comparison::default()
        }
    }

    #[test]
    fn the_table_has_means_spreads_and_paired_differences() {
        let text = comparison("").markdown();
        for line in [
            "| Model | accuracy | Δ accuracy | f1 | Δ f1 | Seeds |\n|---|---:|---:|---:|---:|---:|",
            "| dense | 91.00 ± 1.41 |  | – |  | 2 |",
            "| gemm · FP16 | 92.00 ± 1.41 | +1.00 ± 0.00 | – |  | 2 |",
            "| gemm · INT8 | 89.50 ± 2.12 | −1.50 ± 0.71 | – |  | 2 |",
            "- gemm · INT8: a verdict",
            "Mean over the seeds ± standard deviation.",
            "1 of 2 compressed models kept the dense accuracy, 1 fell below it",
            "seeds 4, 5 · so far 1 of 4 runs",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
        let mut c = comparison("");
        c.rows[2].one_class = 1;
        assert!(c.markdown().contains("| gemm · INT8 (one class) |"));
        assert!(comparison("a|b").markdown().contains("accuracya\\|b"), "a bar ends no cell");
    }

    #[test]
    fn the_page_shows_the_table_and_text_from_outside_stays_text() {
        let hostile = "</title><script src=\"http://x/\">alert('1')</script>&amp;<img onerror=\"x\" ]]> -->";
        for s in ["", hostile] {
            let page = comparison(s).page();
            let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
            let doc = roxmltree::Document::parse_with_options(&page, options).expect("well-formed");
            for node in doc.descendants().filter(|n| n.is_element()) {
                assert!(!["script", "img"].contains(&node.tag_name().name()), "{page}");
            }
            let cells: Vec<String> = doc
                .descendants()
                .filter(|n| n.has_tag_name("td"))
                .map(|n| n.descendants().filter_map(|t| t.text().filter(|_| t.is_text())).collect())
                .collect();
            for cell in ["91.00 ± 1.41", "−1.50 ± 0.71", "88.00", &format!("gemm{s} · INT8")] {
                assert!(cells.iter().any(|c| c == cell), "{cell} is not in {cells:?}");
            }
            assert_eq!(
                doc.descendants().filter(|n| n.attribute("class") == Some("name")).count(),
                2,
                "two plots"
            );
            assert!(!page.contains("NaN"), "{page}");
        }
        // Before the first run is finished there is no table, and the page says so.
        let page = Comparison { rows: vec![], runs: vec![], ..comparison("") }.page();
        assert!(page.contains("No compressed model was scored yet.") && !page.contains("<table"), "{page}");
    }

    #[test]
    fn the_verdict_counts_what_kept_the_score() {
        let mut c = comparison("");
        assert_eq!(c.verdict().0, Outcome::Lost);
        c.rows[2].outcome = Outcome::Held;
        assert_eq!(c.verdict().0, Outcome::Held);
        c.rows[2].outcome = Outcome::Unknown;
        let (outcome, text) = c.verdict();
        assert_eq!(outcome, Outcome::Unknown);
        assert!(
            text.starts_with("1 of 2 compressed models kept") && text.contains("of 1 nothing can be said"),
            "{text}"
        );
        c.rows[1].outcome = Outcome::Unknown;
        assert_eq!(c.verdict(), (Outcome::Unknown, "Nothing can be said of the compressed models.".into()));
    }

    #[test]
    fn scores_that_are_not_numbers_are_null() {
        let dir = tempfile::tempdir().unwrap();
        write_comparison(&comparison("x"), dir.path()).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(COMPARISON_FILE)).unwrap()).unwrap();
        assert_eq!(json["rows"][2]["metrics"][0]["difference"]["values"], serde_json::json!([-2.0, -1.0]));
        assert_eq!(json["rows"][2]["outcome"], "lost");
        assert!(json["rows"][2]["metrics"][1]["score"]["mean"].is_null());
        assert!(dir.path().join(TABLE_FILE).is_file() && dir.path().join(PAGE_FILE).is_file());
    }
}
