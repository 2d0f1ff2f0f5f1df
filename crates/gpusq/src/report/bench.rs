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
    /// What was timed. The first is what the others are compared to.
    pub series: Vec<BenchSeries>,
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

impl Bench {
    /// Column heads and rows of the table.
    fn rows(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let mut head: Vec<String> = ["batch", "length"].map(String::from).into();
        for (i, s) in self.series.iter().enumerate() {
            head.push(format!("{} ms (p99)", s.name));
            if i > 0 {
                head.push(format!("x {}", self.series[0].name));
            }
        }
        head.extend(self.series.last().map(|s| format!("{} sequences/s", s.name)));
        let Some(first) = self.series.first() else { return (head, Vec::new()) };
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
        (head, (0..cells).map(row).collect())
    }

    /// The table, as plain text.
    pub fn table(&self) -> String {
        let (head, rows) = self.rows();
        let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(&rows).collect();
        let width = |c: usize| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let line = |l: &&Vec<String>| {
            let cells = l.iter().zip(&widths).map(|(cell, &width)| format!("{cell:>width$}"));
            cells.collect::<Vec<_>>().join("  ") + "\n"
        };
        lines.iter().map(line).collect()
    }

    /// The page: one HTML document (also well-formed XML) that needs nothing beside itself.
    pub fn page(&self) -> String {
        const CLASSES: [&str; 4] = ["series0", "series1", "series2", "series3"];
        document(&format!("Times of {}", self.model), |out| {
            out.push_str("<ul>");
            for s in &self.series {
                put!(out, "<li>{}: {}</li>", escape(&s.name), escape(&s.about));
            }
            out.push_str("</ul><h2 id=\"plot\">Tokens per second</h2><div class=\"plots\">");
            let mut lengths: Vec<usize> =
                self.series.iter().flat_map(|s| s.cells.iter().map(|c| c.length)).collect();
            lengths.sort_unstable();
            lengths.dedup();
            for length in lengths {
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
            out.push_str("</div><h2 id=\"table\">Times</h2>");
            let (head, rows) = self.rows();
            let head: String = head.iter().map(|h| format!("<th>{}</th>", escape(h))).collect();
            open_table(out, "Times", &head);
            for row in rows {
                let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
                put!(out, "<tr>{cells}</tr>");
            }
            close_table(out);
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
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        write_bench(&bench(), dir.path()).unwrap();
        let text = std::fs::read(dir.path().join(BENCH_FILE)).unwrap();
        assert_eq!(serde_json::from_slice::<Bench>(&text).unwrap(), bench());
        assert!(dir.path().join(PAGE_FILE).exists());
    }
}
