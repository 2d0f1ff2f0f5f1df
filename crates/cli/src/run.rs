//! `gpusq run`: texts in, what a packed model says about them out, a line each.

use std::fs::File;
use std::io::{BufRead, BufReader, stdin};
use std::path::Path;

use clap::ArgMatches;
use gpusq::infer::{Answer, Predictor};
use gpusq::model::Model;
use gpusq::task::{HeadKind, Tokenizer};
use gpusq::tensor::Device;
use gpusq::{Error, Result};
use serde_json::{Map, Value, json};

use crate::args;
use crate::progress::out;

/// Batches that are read before the first of them runs, so that lines of one length find each other.
const AHEAD: usize = 16;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let (device, _) = args::device_of(m)?;
    let name = m.get_one::<String>("input").expect("has a default");
    let (path, mut lines): (&Path, Box<dyn BufRead>) = match name.as_str() {
        "-" => (Path::new("standard input"), Box::new(stdin().lock())),
        name => {
            let path = Path::new(name);
            let file = File::open(path).map_err(Error::io(path))?;
            (path, Box::new(BufReader::new(file)))
        }
    };
    let dir = args::model_dir(m)?;
    let model = Model::load(&dir)?;
    let max_length = m.get_one::<usize>("max-length").copied();
    let predictor = |device| Predictor::new(&model, Tokenizer::load(&dir)?, device, max_length);
    let predictor = match predictor(device) {
        // What `auto` found may not run every model.
        Err(e) if device != Device::Cpu && m.get_one::<String>("device").is_some_and(|d| d == "auto") => {
            eprintln!("note: {e}; running on the CPU");
            predictor(Device::Cpu)?
        }
        other => other?,
    };
    let batch = usize::from(*m.get_one::<u16>("batch-size").expect("has a default"));
    let mut number = 0;
    loop {
        let mut asked = Vec::new();
        while asked.len() < batch * AHEAD {
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line).map_err(Error::io(path))? == 0 {
                break;
            }
            number += 1;
            let here = |message: String| Error::line(path, number, message);
            let line = String::from_utf8(line).map_err(|_| here("is not UTF-8; convert the file".into()))?;
            let line = line.trim_start_matches('\u{feff}').trim();
            if line.is_empty() {
                continue;
            }
            let request = Request::parse(line, predictor.head()).map_err(here)?;
            let prepared = predictor
                .prepare(&request.text, request.pair.as_deref())
                .map_err(|e| Error::line(path, number, e.to_string()))?;
            asked.push((number, request, prepared));
        }
        if asked.is_empty() {
            return Ok(());
        }
        let mut requests = Vec::with_capacity(asked.len());
        let mut prepared = Vec::with_capacity(asked.len());
        for (number, request, p) in asked {
            requests.push((number, request));
            prepared.push(p);
        }
        for ((number, request), answer) in requests.iter().zip(predictor.answers(&prepared, batch)?) {
            out(Value::Object(shown(&predictor, *number, request, answer)));
        }
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
        let object: Map<String, Value> =
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
            (r#"{"text": "a""#, classes, "no JSON object (EOF"),
        ] {
            let message = message(line, head);
            assert!(message.contains(part) && message.contains("write"), "{line}: {message}");
        }
    }
}
