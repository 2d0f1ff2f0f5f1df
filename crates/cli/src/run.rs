//! `gpusq run`: texts in, what a packed model says about them out, a line each.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, stdin};
use std::path::Path;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;

use clap::ArgMatches;
use gpusq::format::unique::Unique;
use gpusq::infer::{Answer, Predictor, Prepared};
use gpusq::model::Model;
use gpusq::task::{HeadKind, Tokenizer};
use gpusq::tensor::Device;
use gpusq::{Error, Result};
use serde_json::{Map, Value, json};

use crate::args;
use crate::progress::{out, unread};

/// Batches that are read before the first of them runs, so that lines of one length find each other.
const AHEAD: usize = 16;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let (device, _) = args::device_of(m)?;
    let name = m.get_one::<String>("input").expect("has a default");
    let (path, source, whole): (&Path, Box<dyn Read + Send>, bool) = match name.as_str() {
        "-" => (Path::new("standard input"), Box::new(stdin()), false),
        name => {
            let path = Path::new(name);
            let file = File::open(path).map_err(Error::io(path))?;
            // A file's batches must not depend on how fast it is read; a named pipe is no such file.
            let whole = file.metadata().is_ok_and(|m| m.is_file());
            (path, Box::new(file), whole)
        }
    };
    let dir = args::model_dir(m)?;
    let model = Model::load(&dir)?;
    args::need_packed(&model, &dir, "run")?;
    let max_length = m.get_one::<usize>("max-length").copied();
    let limit = model.spec.max_length();
    if let Some(asked) = max_length.filter(|n| *n > limit) {
        return Err(Error::Mismatch(format!(
            "--max-length {asked}: {} takes {limit} tokens; use at most {limit}",
            dir.display()
        )));
    }
    let predictor = |device| Predictor::new(&model, Tokenizer::load(&dir)?, device, max_length);
    let predictor = match predictor(device) {
        // What `auto` found may not run every model.
        Err(e) if device != Device::Cpu && m.get_one::<String>("device").is_some_and(|d| d == "auto") => {
            eprintln!("note: {e}; running on the CPU");
            predictor(Device::Cpu)?
        }
        other => other?,
    };
    if let Some(note) = predictor.note() {
        eprintln!("note: {note}");
    }
    let batch = usize::from(*m.get_one::<u16>("batch-size").expect("has a default"));
    let mut lines = Lines { from: read(source, batch * AHEAD), path, number: 0 };
    let mut end = None;
    while end.is_none() {
        let (mut requests, mut prepared) = (Vec::new(), Vec::new());
        // Whoever asks again only after an answer gets it at once; what others write meanwhile is the next batch.
        while prepared.len() < batch * AHEAD {
            let line = match lines.next(whole || prepared.is_empty()) {
                Next::Line(line) => line,
                Next::Later => break,
                Next::End(how) => {
                    end = Some(how);
                    break;
                }
            };
            match line.asks(&predictor) {
                Ok(None) => {}
                Ok(Some((request, input))) => {
                    requests.push((line.number, request));
                    prepared.push(input);
                }
                // A length that leaves no room is no line's fault.
                Err(Error::Config(message)) => {
                    let flag = max_length.map_or(String::new(), |n| format!("--max-length {n}: "));
                    return Err(Error::Config(flag + &message));
                }
                // The lines before it are answered first.
                Err(e) => {
                    end = Some(Err(e));
                    break;
                }
            }
        }
        let answers = predictor.answers(&prepared, batch)?;
        for (((number, request), input), answer) in requests.iter().zip(&prepared).zip(answers) {
            let mut object = shown(&predictor, *number, request, answer);
            if input.dropped() > 0 {
                object.insert("tokens_dropped".into(), input.dropped().into());
            }
            out(Value::Object(object));
        }
        if unread() {
            return Ok(());
        }
    }
    end.unwrap_or(Ok(()))
}

/// Reads lines as they come, at most `ahead` of them before they are asked for.
fn read(from: impl Read + Send + 'static, ahead: usize) -> Receiver<io::Result<Vec<u8>>> {
    let (to, lines) = sync_channel(ahead);
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            let read = match from.read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => Ok(line),
                Err(e) => Err(e),
            };
            let failed = read.is_err();
            if to.send(read).is_err() || failed {
                return;
            }
        }
    });
    lines
}

/// The lines that are still to be answered.
struct Lines<'a> {
    from: Receiver<io::Result<Vec<u8>>>,
    path: &'a Path,
    /// Of the last one, from 1.
    number: usize,
}

/// One line as it came.
struct Line<'a> {
    bytes: Vec<u8>,
    path: &'a Path,
    number: usize,
}

enum Next<'a> {
    Line(Line<'a>),
    /// None has come yet.
    Later,
    End(Result<()>),
}

impl<'a> Lines<'a> {
    /// The next line, which is waited for however long it takes if `patient`.
    fn next(&mut self, patient: bool) -> Next<'a> {
        let next = match patient {
            true => self.from.recv().map_err(|_| TryRecvError::Disconnected),
            false => self.from.try_recv(),
        };
        match next {
            Ok(Ok(bytes)) => {
                self.number += 1;
                Next::Line(Line { bytes, path: self.path, number: self.number })
            }
            Ok(Err(e)) => Next::End(Err(Error::io(self.path)(e))),
            Err(TryRecvError::Empty) => Next::Later,
            Err(TryRecvError::Disconnected) => Next::End(Ok(())),
        }
    }
}

impl Line<'_> {
    /// What it asks, if it is not empty.
    fn asks(&self, predictor: &Predictor) -> Result<Option<(Request, Prepared)>> {
        let here = |message: String| Error::line(self.path, self.number, message);
        let line =
            std::str::from_utf8(&self.bytes).map_err(|_| here("is not UTF-8; convert the file".into()))?;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            return Ok(None);
        }
        let request = Request::parse(line, predictor.head()).map_err(here)?;
        let prepared = predictor.prepare(&request.text, request.pair.as_deref()).map_err(|e| match e {
            e @ Error::Config(_) => e,
            e => here(e.to_string()),
        })?;
        Ok(Some((request, prepared)))
    }
}

/// What one line asks.
struct Request {
    text: String,
    pair: Option<String>,
    /// Comes back with the answer.
    id: Option<Value>,
}

impl Request {
    /// A line of plain text, or a JSON object.
    fn parse(line: &str, head: Option<HeadKind>) -> std::result::Result<Request, String> {
        let spans = head == Some(HeadKind::Span);
        // The fields of the first and of the second text.
        let names = if spans { ["question", "context"] } else { ["text", "text_pair"] };
        let wanted = match spans {
            true => r#"{"question": "...", "context": "..."}"#,
            false => r#"plain text, {"text": "..."} or {"text": "...", "text_pair": "..."}"#,
        };
        if !line.starts_with('{') {
            return match spans {
                true => Err(format!("is no JSON object; the model answers questions, so write {wanted}")),
                false => Ok(Request { text: line.into(), pair: None, id: None }),
            };
        }
        let Unique(object): Unique<Value> =
            serde_json::from_str(line).map_err(|e| format!("is no JSON object ({e}); write {wanted}"))?;
        if let Some(other) = object.keys().find(|k| *k != "id" && !names.contains(&k.as_str())) {
            return Err(format!(
                "has a field `{other}`, which has no meaning here; write {wanted}, and `id` if you like"
            ));
        }
        let field = |name: &str| match object.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(format!("has `{name}`: {other}, which is not text; write {wanted}")),
        };
        let missing = |name: &str| format!("has no field `{name}`; write {wanted}");
        let text = field(names[0])?.ok_or_else(|| missing(names[0]))?;
        let pair = field(names[1])?;
        if spans && pair.is_none() {
            return Err(missing(names[1]));
        }
        Ok(Request { text, pair, id: object.get("id").cloned() })
    }
}

fn shown(predictor: &Predictor, number: usize, request: &Request, answer: Answer) -> Map<String, Value> {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| {
        object.insert(name.into(), value);
    };
    put("line", number.into());
    if let Some(id) = &request.id {
        put("id", id.clone());
    }
    match answer {
        Answer::Classes(probabilities) => {
            let best = (0..probabilities.len()).max_by(|&a, &b| {
                // The first of equals, as scores count it.
                probabilities[a].total_cmp(&probabilities[b]).then(b.cmp(&a))
            });
            let best = best.expect("a classifier has outputs");
            put("label", predictor.labels()[best].clone().into());
            put("probability", json!(probabilities[best]));
            let all = predictor.labels().iter().zip(&probabilities).map(|(l, p)| (l.clone(), json!(p)));
            put("probabilities", Value::Object(all.collect()));
        }
        Answer::Value(value) => put("value", json!(value)),
        Answer::Span { span, probability } => {
            let context = request.pair.as_deref().unwrap_or_default();
            let characters = |at: usize| context.get(..at).map_or(0, |c| c.chars().count());
            put("answer", context.get(span.clone()).unwrap_or_default().into());
            put("start", characters(span.start).into());
            put("end", characters(span.end).into());
            put("probability", json!(probability));
        }
        Answer::Embedding(values) => put("embedding", json!(values)),
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line, and the next after a while.
    struct Slow(std::vec::IntoIter<&'static str>);

    impl Read for Slow {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            thread::sleep(std::time::Duration::from_millis(200));
            let line = self.0.next().unwrap_or_default();
            to[..line.len()].copy_from_slice(line.as_bytes());
            Ok(line.len())
        }
    }

    /// A file's batches do not depend on how fast it is read, and nobody waits for lines that may never come.
    #[test]
    fn lines_of_a_file_are_waited_for_and_others_are_not() {
        let slow = |lines: Vec<&'static str>| Lines {
            from: read(Slow(lines.into_iter()), 8),
            path: Path::new("lines"),
            number: 0,
        };
        let mut file = slow(vec!["a\n", "b\nc\n", "d"]);
        for number in 1..=4 {
            assert!(matches!(file.next(true), Next::Line(line) if line.number == number));
        }
        assert!(matches!(file.next(true), Next::End(Ok(()))));
        let mut typed = slow(vec!["a\n", "b\n"]);
        assert!(matches!(typed.next(true), Next::Line(_)));
        assert!(matches!(typed.next(false), Next::Later));
        assert!(matches!(typed.next(true), Next::Line(line) if line.bytes == b"b\n"));
    }

    fn message(line: &str, head: Option<HeadKind>) -> String {
        Request::parse(line, head).err().unwrap_or_else(|| panic!("accepted {line}"))
    }

    #[test]
    fn plain_text_and_objects_are_read() {
        let plain = Request::parse("a film [x]", None).unwrap();
        assert_eq!((plain.text.as_str(), plain.pair, plain.id), ("a film [x]", None, None));
        let pair =
            Request::parse(r#"{"text": "a", "text_pair": "b", "id": [7]}"#, Some(HeadKind::Value)).unwrap();
        assert_eq!((pair.text.as_str(), pair.pair.as_deref(), pair.id), ("a", Some("b"), Some(json!([7]))));
        let asked = Request::parse(r#"{"question": "who", "context": "me"}"#, Some(HeadKind::Span)).unwrap();
        assert_eq!((asked.text.as_str(), asked.pair.as_deref()), ("who", Some("me")));
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said_with_what_to_write() {
        let classes = Some(HeadKind::Classes(2));
        for (line, head, part) in [
            ("who", Some(HeadKind::Span), "answers questions"),
            (r#"{"question": "who"}"#, Some(HeadKind::Span), "no field `context`"),
            (r#"{"text": 7}"#, classes, "`text`: 7, which is not text"),
            (r#"{"text_pair": "b"}"#, classes, "no field `text`"),
            (r#"{"text": "a", "txt": 1}"#, classes, "a field `txt`"),
            (r#"{"text": "a", "text": "b"}"#, classes, "`text` appears twice"),
            (r#"{"text": "a", "id": 1, "id": 2}"#, classes, "`id` appears twice"),
            (r#"{"text": "a""#, classes, "no JSON object (EOF"),
        ] {
            let message = message(line, head);
            assert!(message.contains(part) && message.contains("write"), "{line}: {message}");
        }
    }
}
