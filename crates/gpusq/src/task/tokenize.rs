//! Text to token ids, with a checkpoint's own tokenizer.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Encoding, Token};

use crate::{Error, Result, textfile};

/// A checkpoint's tokenizer: text in, ids with the special tokens of one text or of a pair out.
///
/// It never pads and truncates only to the length it is given, whatever the tokenizer's file asks for.
pub struct Tokenizer {
    /// Without post-processor, truncation and padding: tokens of the text alone.
    text: tokenizers::Tokenizer,
    single: Frame,
    pair: Frame,
    pad_id: u32,
    vocab_size: usize,
}

/// Special tokens around the texts, as (id, segment): those before the first text, between the two, and
/// after the last, with the segments of the texts themselves.
#[derive(Clone, Debug, Default)]
struct Frame {
    before: Vec<(u32, u32)>,
    between: Vec<(u32, u32)>,
    after: Vec<(u32, u32)>,
    types: [u32; 2],
}

/// Ids with special tokens, and where the texts are among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// Token ids, special tokens included.
    pub ids: Vec<u32>,
    /// Segment of each token.
    pub types: Vec<u32>,
    /// Where the first text's tokens are in `ids`.
    pub first: Range<usize>,
    /// Where the second text's tokens are in `ids`; empty if there is none.
    pub second: Range<usize>,
    /// Tokens at the texts' ends that there was no room for.
    pub dropped: usize,
}

/// The tokens of a text, without special tokens, and the text each stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Pieces {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each token in the text, without white space at its ends, on character boundaries.
    /// Tokens that share one character share its range.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint folder: `tokenizer.json`; else `vocab.txt` (WordPiece, as BERT
    /// and DistilBERT use it, lower-casing unless `tokenizer_config.json` says otherwise); else `vocab.json`
    /// with `merges.txt` (byte-level BPE, as RoBERTa, BART, GPT-2 and OPT use it).
    ///
    /// # Errors
    /// None of these files is there, or one of them is malformed or lacks a special token.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = json_if_there(&dir.join("tokenizer_config.json"))?;
        let pad = token_of(&config, "pad_token");
        let [whole, words, vocab, merges] =
            ["tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"].map(|f| dir.join(f));
        if whole.is_file() {
            let bytes = textfile::bytes(&whole)?;
            let cannot = |e: String| {
                let message =
                    format!("not a tokenizer that can be read ({e}); copy it again from its source");
                Error::file(&whole, message)
            };
            // The tokenizers library panics where a decoder is not JSON, and text is never decoded here.
            let mut json: Value = serde_json::from_slice(&bytes).map_err(|e| cannot(e.to_string()))?;
            if let Some(object) = json.as_object_mut() {
                object.remove("decoder");
            }
            let inner: tokenizers::Tokenizer =
                json.to_string().parse().map_err(|e: tokenizers::Error| cannot(e.to_string()))?;
            Self::new(inner, pad.as_deref()).map_err(|m| Error::file(&whole, m))
        } else if words.is_file() {
            let bytes = textfile::bytes(&words)?;
            let flag = |name: &str| config.get(name).and_then(Value::as_bool);
            let normalizer = BertNormalizer::new(
                true,
                flag("tokenize_chinese_chars").unwrap_or(true),
                flag("strip_accents"),
                flag("do_lower_case").unwrap_or(true),
            );
            let inner = word_piece(&bytes, normalizer).map_err(|m| Error::file(&words, m))?;
            Self::new(inner, pad.as_deref()).map_err(|m| Error::file(&words, m))
        } else if vocab.is_file() && merges.is_file() {
            let style = byte_level_style(dir, &config)?;
            let inner = byte_level(&vocab, &merges, &config, style)?;
            Self::new(inner, pad.as_deref()).map_err(|m| Error::file(&vocab, m))
        } else {
            Err(Error::file(
                dir,
                "no tokenizer here: looked for tokenizer.json, vocab.txt, and vocab.json with merges.txt; \
                 copy these files from the model's source",
            ))
        }
    }

    /// A lower-casing WordPiece tokenizer over `vocab`, whose ids are its positions.
    ///
    /// # Errors
    /// [`Error::Config`] if `vocab` lacks `[UNK]`, `[CLS]` or `[SEP]`.
    pub fn word_piece(vocab: &[&str]) -> Result<Self> {
        let normalizer = BertNormalizer::new(true, true, None, true);
        word_piece(vocab.join("\n").as_bytes(), normalizer)
            .and_then(|inner| Self::new(inner, None))
            .map_err(Error::Config)
    }

    /// Takes the truncation, padding and post-processor out of `inner`; errors say what is wrong with it.
    fn new(mut inner: tokenizers::Tokenizer, pad_token: Option<&str>) -> std::result::Result<Self, String> {
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        let padding = inner.get_padding().map(|p| p.pad_token.clone());
        inner.with_padding(None);
        let vocab = inner.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err("the tokenizer's vocabulary is empty; copy it again from its source".into());
        }
        // GPT-2 and Llama name no padding token. Padding is masked, so that any id in range serves.
        let pad_id = [pad_token, padding.as_deref(), Some("[PAD]"), Some("<pad>")]
            .into_iter()
            .flatten()
            .find_map(|token| vocab.get(token).copied())
            .unwrap_or(0);
        let [single, pair] = [Frame::of(&inner, false)?, Frame::of(&inner, true)?];
        inner.with_post_processor(None::<TemplateProcessing>);
        Ok(Tokenizer { text: inner, single, pair, pad_id, vocab_size })
    }

    /// One more than the largest id it gives: rows that a model's embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id to pad with; 0 where the tokenizer names none.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Special tokens added to one text, or to a pair.
    pub fn added(&self, pair: bool) -> usize {
        let frame = if pair { &self.pair } else { &self.single };
        frame.before.len() + frame.between.len() + frame.after.len()
    }

    /// Ids of `a`, or of the pair `a` and `b`, with special tokens, at most `max_len` of them: tokens are
    /// dropped at the end of the longer text until both fit (HuggingFace's `longest_first`).
    ///
    /// # Errors
    /// [`Error::Config`] if `max_len` leaves no room for a token of each text.
    pub fn encode(&self, a: &str, b: Option<&str>, max_len: usize) -> Result<Encoded> {
        let room = self.room(b.is_some(), max_len)?;
        let a = self.ids(a)?;
        let b = b.map(|b| self.ids(b)).transpose()?;
        let tokens = [a.len(), b.as_ref().map_or(0, Vec::len)];
        let (keep_a, keep_b) = fit(tokens[0], tokens[1], room);
        let joined = self.join(&a[..keep_a], b.as_ref().map(|b| &b[..keep_b]));
        Ok(Encoded { dropped: tokens[0] + tokens[1] - keep_a - keep_b, ..joined })
    }

    /// Tokens that `max_len` leaves for text.
    pub(crate) fn room(&self, pair: bool, max_len: usize) -> Result<usize> {
        let (added, texts) = (self.added(pair), if pair { 2 } else { 1 });
        if max_len < added + texts {
            return Err(Error::Config(format!(
                "a length of {max_len} tokens leaves no room for text beside {added} special tokens; \
                 use at least {}",
                added + texts
            )));
        }
        Ok(max_len - added)
    }

    /// Puts the special tokens around tokens of one text or of two.
    pub(crate) fn join(&self, a: &[u32], b: Option<&[u32]>) -> Encoded {
        let frame = if b.is_some() { &self.pair } else { &self.single };
        let len = a.len() + b.map_or(0, <[u32]>::len) + self.added(b.is_some());
        let (mut ids, mut types) = (Vec::with_capacity(len), Vec::with_capacity(len));
        let mut special = |part: &[(u32, u32)], text: &[u32], kind: u32| {
            ids.extend(part.iter().map(|t| t.0));
            types.extend(part.iter().map(|t| t.1));
            let start = ids.len();
            ids.extend(text);
            types.resize(ids.len(), kind);
            start..ids.len()
        };
        let first = special(&frame.before, a, frame.types[0]);
        let second = match b {
            Some(b) => special(&frame.between, b, frame.types[1]),
            None => first.end..first.end,
        };
        special(&frame.after, &[], 0);
        Encoded { ids, types, first, second, dropped: 0 }
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.text.encode_fast(text, false).map_err(|e| cannot(text, e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// All tokens of `text`, without special tokens, and where in the text each one is.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the tokenizer cannot express the text.
    pub fn pieces(&self, text: &str) -> Result<Pieces> {
        let encoding = self.text.encode(text, false).map_err(|e| cannot(text, e))?;
        let spans =
            encoding.get_offsets().iter().map(|&(start, end)| on_characters(text, start, end)).collect();
        Ok(Pieces { ids: encoding.get_ids().to_vec(), spans })
    }
}

/// `start..end` widened to whole characters, then narrowed to drop white space at its ends.
fn on_characters(text: &str, start: usize, end: usize) -> Range<usize> {
    let (mut start, mut end) = (start.min(text.len()), end.min(text.len()));
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let slice = &text[start..end.max(start)];
    let start = start + (slice.len() - slice.trim_start().len());
    start..start + slice.trim().len()
}

fn cannot(text: &str, reason: tokenizers::Error) -> Error {
    let shown: String = text.chars().take(60).collect();
    Error::Mismatch(format!(
        "the tokenizer cannot express `{shown}`: {reason}; check that its files are complete"
    ))
}

/// How many of `a` and `b` tokens to keep so that both fit into `room`: the longer gives way first.
fn fit(a: usize, b: usize, room: usize) -> (usize, usize) {
    if a + b <= room {
        return (a, b);
    }
    let short = a.min(b).min(room / 2);
    if a > b { (room - short, short) } else { (short, room - short) }
}

impl Frame {
    /// Learns the frame from what the post-processor does to two one-token texts, whatever kind it is.
    fn of(inner: &tokenizers::Tokenizer, pair: bool) -> std::result::Result<Self, String> {
        let probe = |kind| Encoding::from_tokens(vec![Token::new(0, "x".into(), (0, 1))], kind);
        let encoding =
            inner.post_process(probe(0), pair.then(|| probe(1)), true).map_err(|e| e.to_string())?;
        let mut frame = Frame::default();
        let mut texts = 0;
        let tokens = encoding.get_ids().iter().zip(encoding.get_type_ids());
        for ((&id, &kind), text) in tokens.zip(encoding.get_sequence_ids()) {
            match text {
                Some(t) if t == texts && texts < 2 => {
                    frame.types[texts] = kind;
                    texts += 1;
                }
                Some(_) => {
                    return Err(
                        "its special tokens reorder or repeat the texts, which is not supported".into()
                    );
                }
                None if texts == 0 => frame.before.push((id, kind)),
                None if texts == 1 && pair => frame.between.push((id, kind)),
                None => frame.after.push((id, kind)),
            }
        }
        if texts != 1 + usize::from(pair) {
            return Err("its special tokens drop a text, which is not supported".into());
        }
        Ok(frame)
    }
}

/// A JSON object, or `{}` if there is no such file.
fn json_if_there(path: &Path) -> Result<Value> {
    match textfile::bytes(path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))
        }
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(Value::Object(Default::default()))
        }
        Err(e) => Err(e),
    }
}

/// A special token's text, which HuggingFace writes as a string or as an object with `content`.
fn token_of(config: &Value, name: &str) -> Option<String> {
    let token = config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// Registers those of `names` that the vocabulary has, so that the text "[MASK]" is one token.
fn add_special(inner: &mut tokenizers::Tokenizer, names: &[&str]) {
    let known: Vec<_> = names
        .iter()
        .filter(|name| inner.token_to_id(name).is_some())
        // A mask takes the space before it, as in RoBERTa's own files.
        .map(|name| AddedToken::from(*name, true).lstrip(*name == "<mask>"))
        .collect();
    inner.add_special_tokens(&known);
}

fn special(inner: &tokenizers::Tokenizer, name: &str) -> std::result::Result<(String, u32), String> {
    let id = inner.token_to_id(name).ok_or_else(|| {
        format!("the vocabulary has no `{name}`; use the vocabulary that the model was trained with")
    })?;
    Ok((name.to_owned(), id))
}

fn word_piece(
    vocab: &[u8],
    normalizer: BertNormalizer,
) -> std::result::Result<tokenizers::Tokenizer, String> {
    let vocab = WordPiece::read_bytes(vocab).map_err(|e| format!("not a list of tokens: {e}"))?;
    let model = WordPiece::builder().vocab(vocab).build().map_err(|e| e.to_string())?;
    let mut inner = tokenizers::Tokenizer::new(model);
    special(&inner, "[UNK]")?;
    let (cls, sep) = (special(&inner, "[CLS]")?, special(&inner, "[SEP]")?);
    inner.with_normalizer(Some(normalizer));
    inner.with_pre_tokenizer(Some(BertPreTokenizer));
    inner.with_post_processor(Some(BertProcessing::new(sep, cls)));
    add_special(&mut inner, &["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]);
    Ok(inner)
}

/// What a byte-level BPE tokenizer puts around texts; `vocab.json` and `merges.txt` do not tell.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ByteLevelStyle {
    /// RoBERTa, BART: `<s> a </s></s> b </s>`.
    Roberta,
    /// OPT: `</s> a b`.
    Opt,
    /// GPT-2: nothing.
    Plain,
}

fn byte_level_style(dir: &Path, config: &Value) -> Result<ByteLevelStyle> {
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    if class.starts_with("Roberta") || class.starts_with("Bart") {
        return Ok(ByteLevelStyle::Roberta);
    }
    if let Some(begin) = config.get("add_bos_token").and_then(Value::as_bool) {
        return Ok(if begin { ByteLevelStyle::Opt } else { ByteLevelStyle::Plain });
    }
    let path = dir.join("config.json");
    let model = json_if_there(&path)?;
    match model.get("model_type").and_then(Value::as_str) {
        Some("roberta" | "bart") => Ok(ByteLevelStyle::Roberta),
        Some("opt") => Ok(ByteLevelStyle::Opt),
        Some("gpt2") => Ok(ByteLevelStyle::Plain),
        other => Err(Error::file(
            dir,
            format!(
                "cannot tell which special tokens vocab.json and merges.txt belong to: tokenizer_config.json \
                 has no known `tokenizer_class`, and config.json's `model_type` is {}; add tokenizer.json",
                other.unwrap_or("missing")
            ),
        )),
    }
}

fn byte_level(
    vocab: &Path,
    merges: &Path,
    config: &Value,
    style: ByteLevelStyle,
) -> Result<tokenizers::Tokenizer> {
    let (Some(vocab_name), Some(merges_name)) = (vocab.to_str(), merges.to_str()) else {
        return Err(Error::file(vocab, "the path is not valid UTF-8; move the folder"));
    };
    let model = BPE::from_file(vocab_name, merges_name)
        .build()
        .map_err(|e| Error::file(merges, format!("does not fit vocab.json beside it: {e}")))?;
    let mut inner = tokenizers::Tokenizer::new(model);
    let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    inner.with_pre_tokenizer(Some(ByteLevel::new(prefix, true, true)));
    let missing = |message| Error::file(vocab, message);
    match style {
        ByteLevelStyle::Roberta => {
            let (sep, cls) = (special(&inner, "</s>"), special(&inner, "<s>"));
            inner.with_post_processor(Some(RobertaProcessing::new(
                sep.map_err(missing)?,
                cls.map_err(missing)?,
            )));
        }
        ByteLevelStyle::Opt => {
            let name = token_of(config, "bos_token").unwrap_or_else(|| "</s>".into());
            let begin = special(&inner, &name).map_err(missing)?;
            let template = TemplateProcessing::builder()
                .try_single(format!("{name} $A"))
                .and_then(|t| t.try_pair(format!("{name} $A $B:1")))
                .map_err(missing)?
                .special_tokens(vec![begin])
                .build()
                .map_err(|e| missing(e.to_string()))?;
            inner.with_post_processor(Some(template));
        }
        ByteLevelStyle::Plain => {}
    }
    add_special(&mut inner, &["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]);
    Ok(inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::utils::truncation::{TruncationParams, TruncationStrategy};

    use super::super::tests::{minilm, tiny};
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn error(dir: &Path) -> String {
        Tokenizer::load(dir).map(|_| ()).unwrap_err().to_string()
    }

    const WORDS: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nThe\nthe\ncat\n##s\n";

    #[test]
    fn vocab_txt_lower_cases_unless_told_otherwise() {
        let dir = folder(&[("vocab.txt", WORDS)]);
        let lower = Tokenizer::load(dir.path()).unwrap();
        let encoded = lower.encode("The cats", Some("the"), 16).unwrap();
        assert_eq!(encoded.ids, [2, 5, 6, 7, 3, 5, 3]);
        assert_eq!(encoded.types, [0, 0, 0, 0, 0, 1, 1]);
        assert_eq!((encoded.first, encoded.second), (1..4, 5..6));
        assert_eq!((lower.vocab_size(), lower.pad_id()), (8, 0));
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"do_lower_case": false}"#).unwrap();
        let cased = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(cased.encode("The cats [SEP]", None, 16).unwrap().ids, [2, 4, 6, 7, 3, 3]);
    }

    /// `vocab.json` and `merges.txt` whose tokens are RoBERTa's special ones, the 256 bytes and "Ġt".
    fn bytes(config: &str) -> tempfile::TempDir {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let special = ["<s>", "<pad>", "</s>", "<unk>"].map(str::to_owned);
        let tokens = special.into_iter().chain(alphabet.into_iter().map(String::from)).chain(["Ġt".into()]);
        let vocab: serde_json::Map<_, _> = tokens.enumerate().map(|(i, t)| (t, Value::from(i))).collect();
        folder(&[
            ("vocab.json", &serde_json::to_string(&vocab).unwrap()),
            ("merges.txt", "#version: 0.2\nĠ t\n"),
            ("tokenizer_config.json", config),
        ])
    }

    #[test]
    fn byte_level_files_get_their_familys_special_tokens() {
        let dir = bytes(r#"{"tokenizer_class": "RobertaTokenizer", "pad_token": {"content": "<pad>"}}"#);
        let roberta = Tokenizer::load(dir.path()).unwrap();
        let id = |text: &str| roberta.text.token_to_id(text).unwrap();
        let encoded = roberta.encode("a t", Some("b"), 16).unwrap();
        assert_eq!(encoded.ids, [0, id("a"), id("Ġt"), 2, 2, id("b"), 2]);
        assert_eq!(encoded.types, [0; 7]);
        assert_eq!((roberta.pad_id(), roberta.vocab_size(), roberta.added(true)), (1, 261, 4));

        let dir = bytes(r#"{"tokenizer_class": "GPT2Tokenizer", "add_bos_token": true}"#);
        let opt = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(opt.encode("a", None, 16).unwrap().ids, [2, id("a")]);

        let dir = bytes("{}");
        assert!(error(dir.path()).contains("`model_type` is missing"), "{}", error(dir.path()));
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
        let gpt2 = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(gpt2.encode("a", Some("b"), 16).unwrap().ids, [id("a"), id("b")]);
    }

    #[test]
    fn pieces_point_at_whole_characters_without_white_space() {
        let dir = bytes(r#"{"tokenizer_class": "RobertaTokenizer"}"#);
        let roberta = Tokenizer::load(dir.path()).unwrap();
        // One token a byte: two for é, four for the emoji, and " t" as one.
        let text = "é t\u{1f600}";
        let pieces = roberta.pieces(text).unwrap();
        let shown: Vec<&str> = pieces.spans.iter().map(|s| &text[s.clone()]).collect();
        assert_eq!(shown, ["é", "é", "t", "\u{1f600}", "\u{1f600}", "\u{1f600}", "\u{1f600}"]);
        let text = "  cafe\u{301}  \u{6c34}\u{706b} cats";
        let pieces = tiny().pieces(text).unwrap();
        let shown: Vec<&str> = pieces.spans.iter().map(|s| &text[s.clone()]).collect();
        assert_eq!(shown, ["cafe", "\u{6c34}", "\u{706b}", "cat", "s"]);
    }

    #[test]
    fn folders_without_a_usable_tokenizer_are_refused() {
        let dir = folder(&[("vocab.json", "{}")]);
        let found = error(dir.path());
        assert!(found.contains("tokenizer.json, vocab.txt, and vocab.json with merges.txt"), "{found}");
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("tokenizer.json", "{")], "tokenizer.json: not a tokenizer that can be read"),
            (&[("tokenizer.json", "")], "tokenizer.json: not a tokenizer that can be read"),
            (&[("vocab.txt", "")], "vocab.txt: the vocabulary has no `[UNK]`"),
            (&[("vocab.txt", "[UNK]\n[CLS]\n")], "vocab.txt: the vocabulary has no `[SEP]`"),
            (
                &[("vocab.txt", WORDS), ("tokenizer_config.json", "{")],
                "tokenizer_config.json: not valid JSON",
            ),
            (
                &[
                    ("vocab.json", r#"{"a": 0}"#),
                    ("merges.txt", "a b\n"),
                    ("config.json", r#"{"model_type": "gpt2"}"#),
                ],
                "merges.txt: does not fit vocab.json",
            ),
            (
                &[
                    ("vocab.json", r#"{"a": 0}"#),
                    ("merges.txt", ""),
                    ("config.json", r#"{"model_type": "bart"}"#),
                ],
                "vocab.json: the vocabulary has no `</s>`",
            ),
        ];
        for (files, expected) in cases {
            let dir = folder(files);
            let found = error(dir.path());
            assert!(found.contains(expected), "expected `{expected}`, found `{found}`");
        }
    }

    #[test]
    fn a_tokenizers_own_padding_and_truncation_are_off() {
        let mut inner = word_piece(WORDS.as_bytes(), BertNormalizer::default()).unwrap();
        inner.with_padding(Some(tokenizers::PaddingParams {
            strategy: tokenizers::PaddingStrategy::Fixed(12),
            pad_token: "cat".into(),
            ..Default::default()
        }));
        inner.with_truncation(Some(TruncationParams { max_length: 4, ..Default::default() })).unwrap();
        let dir = tempfile::tempdir().unwrap();
        inner.save(dir.path().join("tokenizer.json"), false).unwrap();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("the", None, 16).unwrap().ids.len(), 3);
        assert_eq!(tokenizer.encode("the the the the the", None, 16).unwrap().ids.len(), 7);
        assert_eq!(tokenizer.pad_id(), 6, "the padding token that the file names");
    }

    #[test]
    fn too_short_a_length_is_refused() {
        let found = tiny().encode("the", Some("cat"), 4).unwrap_err().to_string();
        assert!(found.contains("3 special tokens; use at least 5"), "{found}");
        assert_eq!(tiny().encode("the", Some("cat"), 5).unwrap().ids, [2, 5, 3, 6, 3]);
    }

    #[test]
    fn minilm_tokenises_like_its_own_file() {
        let Some(dir) = minilm() else { return };
        let tokenizer = Tokenizer::load(&dir).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.pad_id()), (30522, 0));
        let encoded = tokenizer.encode("Hello, world!", None, 128).unwrap();
        assert_eq!(encoded.ids, [101, 7592, 1010, 2088, 999, 102]);
        // The same ids when its vocabulary is read without tokenizer.json.
        let plain = tempfile::tempdir().unwrap();
        for file in ["vocab.txt", "tokenizer_config.json"] {
            std::fs::copy(dir.join(file), plain.path().join(file)).unwrap();
        }
        let plain = Tokenizer::load(plain.path()).unwrap();
        let text = "Caf\u{e9}s in Z\u{fc}rich [MASK] 水火, isn't it? \u{1f600} naïvely";
        let (a, b) = (tokenizer.encode(text, Some(text), 24), plain.encode(text, Some(text), 24));
        assert_eq!(a.unwrap(), b.unwrap());
    }

    proptest! {
        /// Length, and equality with the library's own truncation.
        #[test]
        fn truncation_keeps_to_the_length(
            a in prop::collection::vec("the|cats|dog|é水", 0..30),
            b in prop::option::of(prop::collection::vec("the|cats|dog|é水", 0..30)),
            max_len in 5usize..40,
        ) {
            let (a, b) = (a.join(" "), b.map(|b| b.join(" ")));
            let encoded = tiny().encode(&a, b.as_deref(), max_len).unwrap();
            prop_assert!(encoded.ids.len() <= max_len);
            prop_assert_eq!(encoded.ids.len(), encoded.types.len());
            let mut theirs = word_piece(WORDS.as_bytes(), BertNormalizer::default()).unwrap();
            theirs
                .with_truncation(Some(TruncationParams {
                    max_length: max_len,
                    strategy: TruncationStrategy::LongestFirst,
                    ..Default::default()
                }))
                .unwrap();
            let ours = Tokenizer::new(theirs.clone(), None).unwrap().encode(&a, b.as_deref(), max_len).unwrap();
            let theirs = match &b {
                Some(b) => theirs.encode((a.as_str(), b.as_str()), true),
                None => theirs.encode(a.as_str(), true),
            }
            .unwrap();
            prop_assert_eq!(ours.ids.as_slice(), theirs.get_ids());
            prop_assert_eq!(ours.types.as_slice(), theirs.get_type_ids());
        }
    }
}
