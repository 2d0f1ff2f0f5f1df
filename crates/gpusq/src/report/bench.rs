//! Times of a model over a grid of batch sizes and lengths, as a table, a page and JSON.

use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::html::{close_table, document, escape, open_table, put, run};
use super::plot::{Line, Scale, plot};
use super::{Machine, PAGE_FILE, RunRecord, fixed, grouped, write_together};
use crate::{Error, Result};

/// File of a [`Bench`] in its output folder.
pub const BENCH_FILE: &str = "bench.json";

/// Everything `gpusq bench` has measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bench {
    /// The model: its folder, or the name of a size.
    pub model: String,
    /// Where it ran.
    pub machine: Machine,
    /// Versions of what else takes part, such as the driver.
    pub versions: String,
    /// The program's.
    pub version: String,
    /// The command line.
    pub command: String,
    /// When it began, UTC.
    pub started: String,
    /// Of every time.
    pub unit: Unit,
    /// What was timed. The first is what the others are compared to.
    pub series: Vec<BenchSeries>,
    /// Batches of real texts.
    pub texts: Vec<BenchTexts>,
    /// From a folder to a first answer.
    pub loads: Vec<BenchLoad>,
}

/// What times are counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Unit {
    /// Thousandths of a second.
    #[default]
    #[serde(rename = "ms")]
    Milliseconds,
}

/// What a process takes from its start to its first answer, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchLoad {
    /// What was there before.
    pub name: String,
    /// Sequences of the batch that is answered.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Starting the program, and opening the GPU.
    pub open: f64,
    /// Reading and checking the packed folder.
    pub read: f64,
    /// Arranging the weights, on a GPU with its memory.
    pub prepare: f64,
    /// The first batch: on a GPU with the plan and the graph.
    pub first: f64,
}

impl BenchLoad {
    /// From the packed folder to the answer, in a program that has its GPU open.
    pub fn load(&self) -> f64 {
        self.read + self.prepare + self.first
    }
}

/// Batches of texts as they come, in milliseconds, beside batches of the same size with every sequence as long as the
/// longest may be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchTexts {
    /// Texts of a batch.
    pub batch: usize,
    /// The most tokens of one.
    pub length: usize,
    /// How often each batch was run.
    pub runs: usize,
    /// Median time of a batch whose texts all have `length` tokens.
    pub padded: f64,
    /// The batches.
    pub batches: Vec<TextBatch>,
}

/// A batch of texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextBatch {
    /// Of all its texts.
    pub tokens: usize,
    /// The median time.
    pub median: f64,
}

impl BenchTexts {
    fn mean(&self, of: impl Fn(&TextBatch) -> f64) -> f64 {
        self.batches.iter().map(of).sum::<f64>() / self.batches.len().max(1) as f64
    }

    /// Tokens of a batch, in the mean.
    pub fn tokens(&self) -> f64 {
        self.mean(|b| b.tokens as f64)
    }

    /// Time of a batch, in the mean.
    pub fn milliseconds(&self) -> f64 {
        self.mean(|b| b.median)
    }

    /// Tokens as a share of those of padded batches.
    pub fn token_share(&self) -> f64 {
        self.tokens() / (self.batch * self.length) as f64
    }

    /// Time as a share of that of padded batches. Where it is [`BenchTexts::token_share`], padding costs nothing.
    pub fn time_share(&self) -> f64 {
        self.milliseconds() / self.padded
    }
}

/// One way to run the model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchSeries {
    /// Short name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// Times, by length and then by batch size.
    pub cells: Vec<BenchCell>,
}

/// Times of one batch size and length, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BenchCell {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// How often it was run.
    pub runs: usize,
    /// The shortest run.
    pub least: f64,
    /// Half of the runs were shorter.
    pub median: f64,
    /// Nine of ten runs were shorter.
    pub p90: f64,
    /// 99 of 100 runs were shorter.
    pub p99: f64,
    /// The longest run.
    pub most: f64,
    /// A request as a program sees it: preparing the tokens, running, and reading the outputs; the median of a few.
    pub request: f64,
}

impl BenchCell {
    /// Of `milliseconds`, in ascending order, one at least.
    pub fn new(batch: usize, length: usize, milliseconds: &[f64], request: f64) -> BenchCell {
        let n = milliseconds.len();
        let at = |share: f64| milliseconds[((n as f64 * share).ceil() as usize).clamp(1, n) - 1];
        BenchCell {
            batch,
            length,
            runs: n,
            least: milliseconds[0],
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            most: milliseconds[n - 1],
            request,
        }
    }

    /// Sequences in a second.
    pub fn sequences_per_second(&self) -> f64 {
        self.batch as f64 / self.median * 1e3
    }

    /// Tokens in a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.sequences_per_second() * self.length as f64
    }
}

/// Times as they are shown.
struct Table {
    caption: &'static str,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// As plain text.
    fn plain(&self) -> String {
        let lines: Vec<&Vec<String>> = std::iter::once(&self.head).chain(&self.rows).collect();
        let width = |c: usize| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();
        let line = |l: &&Vec<String>| {
            let cells = l.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}"));
            cells.collect::<Vec<_>>().join("  ") + "\n"
        };
        lines.iter().map(line).collect()
    }
}

impl Bench {
    fn text_table(&self) -> Table {
        let head = [
            "batch",
            "up to",
            "tokens each",
            "of padded",
            "ms",
            "padded ms",
            "of padded",
            "tokens/s",
            "padded tokens/s",
        ];
        let row = |t: &BenchTexts| {
            let per_second = |tokens: f64, ms: f64| grouped((tokens / ms * 1e3).round() as u64);
            vec![
                t.batch.to_string(),
                t.length.to_string(),
                fixed(t.tokens() / t.batch as f64, 1),
                fixed(t.token_share(), 3),
                fixed(t.milliseconds(), 3),
                fixed(t.padded, 3),
                fixed(t.time_share(), 3),
                per_second(t.tokens(), t.milliseconds()),
                per_second((t.batch * t.length) as f64, t.padded),
            ]
        };
        let caption = "Batches of texts, and the same padded";
        Table { caption, head: head.map(String::from).into(), rows: self.texts.iter().map(row).collect() }
    }

    fn load_table(&self) -> Table {
        let head =
            ["load", "first batch", "open ms", "read ms", "prepare ms", "first ms", "folder to answer ms"];
        let row = |l: &BenchLoad| {
            let times = [l.open, l.read, l.prepare, l.first, l.load()].map(|ms| fixed(ms, 1));
            [vec![l.name.clone(), format!("{} x {}", l.batch, l.length)], times.into()].concat()
        };
        let caption = "From the packed folder to the first answer";
        Table { caption, head: head.map(String::from).into(), rows: self.loads.iter().map(row).collect() }
    }

    fn grid_table(&self) -> Table {
        let caption = "Times";
        let mut head: Vec<String> = ["batch", "length"].map(String::from).into();
        for (i, s) in self.series.iter().enumerate() {
            head.push(format!("{} ms (p99)", s.name));
            if i > 0 {
                head.push(format!("x {}", self.series[0].name));
            }
        }
        head.extend(self.series.last().map(|s| format!("{} sequences/s", s.name)));
        let Some(first) = self.series.first() else { return Table { caption, head, rows: Vec::new() } };
        let row = |i: usize| {
            let mut row = vec![first.cells[i].batch.to_string(), first.cells[i].length.to_string()];
            for (k, cell) in self.series.iter().map(|s| &s.cells[i]).enumerate() {
                row.push(format!("{} ({})", fixed(cell.median, 3), fixed(cell.p99, 3)));
                if k > 0 {
                    row.push(fixed(first.cells[i].median / cell.median, 2));
                }
            }
            row.extend(self.series.last().map(|s| grouped(s.cells[i].sequences_per_second().round() as u64)));
            row
        };
        let cells = self.series.iter().map(|s| s.cells.len()).min().unwrap_or(0);
        Table { caption, head, rows: (0..cells).map(row).collect() }
    }

    /// Every table that has rows.
    fn tables(&self) -> Vec<Table> {
        let all = [self.grid_table(), self.text_table(), self.load_table()];
        all.into_iter().filter(|t| !t.rows.is_empty()).collect()
    }

    /// The tables, as plain text.
    pub fn table(&self) -> String {
        self.tables().iter().map(Table::plain).collect::<Vec<_>>().join("\n")
    }

    /// The page: one HTML document (also well-formed XML) that needs nothing beside itself.
    pub fn page(&self) -> String {
        const CLASSES: [&str; 4] = ["series0", "series1", "series2", "series3"];
        document(&format!("Times of {}", self.model), |out| {
            out.push_str("<ul>");
            for s in &self.series {
                put!(out, "<li>{}: {}</li>", escape(&s.name), escape(&s.about));
            }
            let mut lengths: Vec<usize> =
                self.series.iter().flat_map(|s| s.cells.iter().map(|c| c.length)).collect();
            lengths.sort_unstable();
            lengths.dedup();
            out.push_str("</ul>");
            if !lengths.is_empty() {
                out.push_str("<h2 id=\"plot\">Tokens per second</h2><div class=\"plots\">");
            }
            for &length in &lengths {
                let line = |(s, class): (&BenchSeries, &'static str)| {
                    let own = s.cells.iter().filter(|c| c.length == length);
                    let points = own.map(|c| (c.batch as f64, c.tokens_per_second()));
                    let mut points: Vec<(f64, f64)> = points.collect();
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    Line { class, points }
                };
                let lines: Vec<Line> =
                    self.series.iter().zip(CLASSES.into_iter().cycle()).map(line).collect();
                put!(out, "<figure><h3>{length} tokens, by batch size</h3><ul class=\"key\">");
                for (s, line) in self.series.iter().zip(&lines) {
                    put!(
                        out,
                        "<li><svg viewBox=\"0 0 24 10\" aria-hidden=\"true\"><path class=\"line {}\" d=\"M0 5H24\"/></svg>{}</li>",
                        line.class,
                        escape(&s.name)
                    );
                }
                let label = format!("Tokens per second by batch size, {length} tokens each");
                put!(out, "</ul>{}</figure>", plot(&label, &lines, Scale::Linear, 220.0).svg);
            }
            if !lengths.is_empty() {
                out.push_str("</div>");
            }
            out.push_str("<h2 id=\"table\">Times</h2>");
            for Table { caption, head, rows } in self.tables() {
                let head: String = head.iter().map(|h| format!("<th>{}</th>", escape(h))).collect();
                open_table(out, caption, &head);
                for row in rows {
                    let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
                    put!(out, "<tr>{cells}</tr>");
                }
                close_table(out);
            }
            put!(
                out,
                "<p class=\"muted\">Medians, and in brackets what 99 of 100 runs stay below. Ratios above 1 are faster. {}</p>",
                escape(&self.versions)
            );
            let known = RunRecord {
                started: self.started.clone(),
                machine: self.machine.clone(),
                version: self.version.clone(),
                command: self.command.clone(),
                ..RunRecord::default()
            };
            run(out, &known);
        })
    }
}

/// Writes `bench.json` and `report.html` into the folder `dir`, as [`super::write()`] does.
///
/// # Errors
/// What writing meets.
pub fn write_bench(bench: &Bench, dir: &Path) -> Result<()> {
    let file = dir.join(BENCH_FILE);
    let json = serde_json::to_vec_pretty(bench).map_err(|e| Error::file(&file, e.to_string()))?;
    write_together(dir, [(PAGE_FILE, bench.page().into_bytes()), (BENCH_FILE, json)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench() -> Bench {
        let cells = |factor: f64| {
            let cell = |batch: usize| {
                let runs: Vec<f64> = (1..=100).map(|i| factor * i as f64 * batch as f64).collect();
                BenchCell::new(batch, 128, &runs, 1.0)
            };
            vec![cell(1), cell(8)]
        };
        let series =
            |name: &str, factor| BenchSeries { name: name.into(), about: "<b>".into(), cells: cells(factor) };
        Bench {
            model: "a & b".into(),
            series: vec![series("int8", 0.02), series("gemm", 0.01)],
            ..Bench::default()
        }
    }

    #[test]
    fn percentiles_are_of_the_runs() {
        let c = BenchCell::new(2, 10, &[1.0, 2.0, 3.0, 4.0], 0.0);
        assert_eq!((c.least, c.median, c.p90, c.p99, c.most), (1.0, 2.0, 4.0, 4.0, 4.0));
        assert_eq!((c.sequences_per_second(), c.tokens_per_second()), (1000.0, 10_000.0));
    }

    #[test]
    fn table_and_page_say_how_much_faster() {
        let table = bench().table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].ends_with("gemm sequences/s") && lines[0].contains("x int8"), "{table}");
        let cells: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(cells, ["8", "128", "8.000", "(15.840)", "4.000", "(7.920)", "2.00", "2,000"]);
        let page = bench().page();
        let doc = roxmltree::Document::parse_with_options(
            &page,
            roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() },
        );
        let text: String = doc.unwrap().descendants().filter_map(|n| n.text()).collect();
        for part in ["a & b", "gemm: <b>", "4.000 (7.920)", "128 tokens, by batch size"] {
            assert!(text.contains(part), "no {part}");
        }
    }

    #[test]
    fn texts_and_loads_have_their_tables() {
        let texts = BenchTexts {
            batch: 4,
            length: 100,
            runs: 5,
            padded: 2.0,
            batches: vec![TextBatch { tokens: 150, median: 0.8 }, TextBatch { tokens: 250, median: 1.2 }],
        };
        assert_eq!((texts.token_share(), texts.time_share()), (0.5, 0.5));
        let load = BenchLoad {
            name: "cold".into(),
            batch: 1,
            length: 128,
            open: 300.0,
            read: 1.0,
            prepare: 2.0,
            first: 3.5,
        };
        let bench = Bench { texts: vec![texts], loads: vec![load], ..Bench::default() };
        let table = bench.table();
        let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
        let texts = ["4", "100", "50.0", "0.500", "1.000", "2.000", "0.500", "200,000", "200,000"];
        assert_eq!(lines[1], texts, "{table}");
        assert_eq!(lines[4], ["cold", "1", "x", "128", "300.0", "1.0", "2.0", "3.5", "6.5"], "{table}");
        let page = bench.page();
        assert!(page.contains("padded tokens/s") && page.contains("folder to answer ms"));
        assert!(!page.contains("class=\"plots\""));
        let json = serde_json::to_value(&bench).unwrap();
        assert_eq!(json["unit"], "ms");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        write_bench(&bench(), dir.path()).unwrap();
        let text = std::fs::read(dir.path().join(BENCH_FILE)).unwrap();
        assert_eq!(serde_json::from_slice::<Bench>(&text).unwrap(), bench());
        assert!(dir.path().join(PAGE_FILE).exists());
    }
}
