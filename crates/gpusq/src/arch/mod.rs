//! Model families: how a HuggingFace `config.json` and its tensor names become a specification.
//!
//! One file per family and one line in [`ARCHS`]. Nothing outside this folder knows a family's name.

mod bart;
mod bert;
mod distilbert;
mod gpt2;
mod llama;
mod opt;
mod roberta;

use std::path::Path;

use gpusq_tensor::ops::activation::Activation;
use serde_json::Value;

use crate::spec::{Head, TransformerSpec};
use crate::{Error, Result, textfile};

/// A model family.
pub struct Arch {
    /// `model_type` in config.json.
    pub name: &'static str,
    /// One line for people.
    pub doc: &'static str,
    /// Reads the configuration.
    pub spec: fn(&Config) -> Result<TransformerSpec>,
    /// The checkpoint's tensors for a specification of this family.
    pub tensors: fn(&TransformerSpec) -> Vec<Entry>,
    /// Prefix of the body's tensor names, which checkpoints of the bare body leave out.
    pub prefix: &'static str,
    /// Names of the classes that hold the family's heads, for `architectures` in config.json.
    pub classes: Classes,
    /// The head a task needs, in this family's form.
    pub classifier: Option<Activation>,
}

impl Arch {
    /// The names under which checkpoints hold the tensor `name`, the usual one first: one of the bare body
    /// leaves out the prefix, and early ones (bert-base-uncased) call a norm's weight and bias gamma and beta.
    pub fn spellings(&self, name: &str) -> [String; 4] {
        let bare = name.strip_prefix(self.prefix).unwrap_or(name);
        let early = |n: &str| {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        };
        [name.to_string(), bare.to_string(), early(name), early(bare)]
    }
}

/// HuggingFace class names by head; empty where the family has none here.
pub struct Classes {
    /// Without a head.
    pub body: &'static str,
    /// Sequence classification or regression.
    pub classify: &'static str,
    /// Extractive question answering.
    pub span: &'static str,
    /// Language modelling or conditional generation.
    pub language_model: &'static str,
}

/// Every family.
pub const ARCHS: &[Arch] =
    &[bert::ARCH, distilbert::ARCH, roberta::ARCH, gpt2::ARCH, opt::ARCH, llama::ARCH, bart::ARCH];

/// How a checkpoint's tensor holds a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As it is.
    Same,
    /// `[in, out]` instead of `[out, in]`.
    Transposed,
    /// Part `part` of `parts` along the last dimension; 2-D parts are transposed as well.
    Part {
        /// Which.
        part: usize,
        /// Of how many.
        parts: usize,
    },
    /// With a leading dimension of 1; a constant that is not trained.
    Constant,
}

/// One weight and the tensor that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in [`crate::params::Params`].
    pub ours: String,
    /// Name in the checkpoint.
    pub theirs: String,
    /// How it is held.
    pub layout: Layout,
}

impl Entry {
    fn new(ours: impl Into<String>, theirs: impl Into<String>, layout: Layout) -> Self {
        Entry { ours: ours.into(), theirs: theirs.into(), layout }
    }
}

/// Weight-and-bias pairs `(ours, theirs)` as entries; biases only where `bias`.
fn pairs(out: &mut Vec<Entry>, ours: String, theirs: String, layout: Layout, bias: bool) {
    out.push(Entry::new(format!("{ours}.weight"), format!("{theirs}.weight"), layout));
    if bias {
        let layout = if layout == Layout::Transposed { Layout::Same } else { layout };
        out.push(Entry::new(format!("{ours}.bias"), format!("{theirs}.bias"), layout));
    }
}

/// The family of a configuration.
pub fn find(config: &Config) -> Result<&'static Arch> {
    let name = config.text("model_type")?;
    ARCHS.iter().find(|a| a.name == name).ok_or_else(|| {
        let known: Vec<&str> = ARCHS.iter().map(|a| a.name).collect();
        config.error(format!("model_type `{name}` is not supported; supported: {}", known.join(", ")))
    })
}

/// A parsed config.json that remembers its file for errors.
#[derive(Clone, Debug)]
pub struct Config {
    path: std::path::PathBuf,
    /// The JSON object as it was read.
    pub json: Value,
}

impl Config {
    /// Reads `dir/config.json`.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        Self::parse(&path, &textfile::text(&path)?)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Parses the text of a config.json; `path` is for errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text)
            .map_err(|e| Error::line(path, e.line(), format!("not valid JSON: {e}")))?;
        if !json.is_object() {
            return Err(Error::file(path, "not a JSON object; expected a HuggingFace config.json"));
        }
        Ok(Config { path: path.to_path_buf(), json })
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::file(&self.path, message)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, wanted: &str) -> Error {
        match self.get(key) {
            None => self.error(format!("`{key}` is missing; expected {wanted}")),
            Some(v) => self.error(format!("`{key}` is {v}; expected {wanted}")),
        }
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a string"))
    }

    /// A size: 1 to 2^24, so that products of two do not overflow and a hostile file cannot ask for the machine.
    fn size(&self, key: &str) -> Result<usize> {
        let v = self.get(key).and_then(Value::as_u64).filter(|v| (1..=1 << 24).contains(v));
        v.map(|v| v as usize).ok_or_else(|| self.wrong(key, "an integer between 1 and 16777216"))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_none() { Ok(default) } else { self.size(key) }
    }

    fn count(&self, key: &str) -> Result<usize> {
        let v = self.get(key).and_then(Value::as_u64).filter(|&v| v <= 4096);
        v.map(|v| v as usize).ok_or_else(|| self.wrong(key, "an integer between 0 and 4096"))
    }

    fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().filter(|v| v.is_finite()).ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    /// What a norm adds to a variance: as f32 above 0, without which a constant row has no root.
    fn epsilon_or(&self, key: &str, default: f64) -> Result<f32> {
        let eps = self.float_or(key, default)? as f32;
        if eps > 0.0 && eps.is_finite() { Ok(eps) } else { Err(self.wrong(key, "a small positive number")) }
    }

    fn probability_or(&self, key: &str, default: f64) -> Result<f32> {
        let p = self.float_or(key, default)?;
        if (0.0..1.0).contains(&(p as f32)) {
            Ok(p as f32)
        } else {
            Err(self.wrong(key, "a probability below 1"))
        }
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    fn token(&self, key: &str) -> Option<u32> {
        // Newer Llama configurations list several end tokens; the first one closes a sequence.
        let v = self.get(key)?;
        let v = v.as_array().and_then(|a| a.first()).unwrap_or(v);
        v.as_u64().map(|v| v as u32)
    }

    fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = if self.get(key).is_none() { default } else { self.text(key)? };
        match name {
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            "silu" | "swish" => Ok(Activation::Silu),
            _ => Err(self.wrong(key, "one of gelu, gelu_new, gelu_pytorch_tanh, relu, silu")),
        }
    }

    /// Heads and width of a head of a stack that is `hidden` wide.
    fn heads(&self, key: &str, hidden: usize) -> Result<(usize, usize)> {
        let heads = self.size(key)?;
        if !hidden.is_multiple_of(heads) {
            return Err(self.error(format!("`{key}` {heads} does not divide the hidden size {hidden}")));
        }
        Ok((heads, hidden / heads))
    }

    /// Refuses an option the forward pass does not implement.
    fn refuse(&self, key: &str, value: bool) -> Result<()> {
        if self.flag_or(key, !value)? == value {
            return Err(self.error(format!("`{key}`: {value} is not supported")));
        }
        Ok(())
    }

    /// The head that `architectures` names.
    fn head(
        &self,
        classes: &Classes,
        dense: Option<Activation>,
        language_model: Option<Head>,
    ) -> Result<Head> {
        let class = self.json.pointer("/architectures/0").and_then(Value::as_str).unwrap_or(classes.body);
        let outputs = match self.get("id2label").and_then(Value::as_object) {
            Some(map) => map.len(),
            None => self.size_or("num_labels", 2)?,
        };
        Ok(match class {
            c if c == classes.body => Head::None,
            c if c == classes.classify && !c.is_empty() => Head::Classify { outputs, dense },
            c if c == classes.span && !c.is_empty() => Head::Span,
            c if c == classes.language_model && language_model.is_some() => {
                language_model.expect("just checked")
            }
            // A pre-training head (masked language model) is dropped: the body is what tasks start from.
            c if c.ends_with("ForMaskedLM") || c.ends_with("ForPreTraining") => Head::None,
            other => {
                let known = [classes.body, classes.classify, classes.span, classes.language_model];
                let known: Vec<&str> = known.into_iter().filter(|k| !k.is_empty()).collect();
                return Err(self.error(format!(
                    "architecture `{other}` is not supported; supported: {}",
                    known.join(", ")
                )));
            }
        })
    }
}

/// The configuration of `config` with the head of `spec` written into it.
pub fn with_head(config: &Config, spec: &TransformerSpec) -> Result<Value> {
    let arch = find(config)?;
    let mut json = config.json.clone();
    let class = match &spec.head {
        Head::None => arch.classes.body,
        Head::Classify { .. } => arch.classes.classify,
        Head::Span => arch.classes.span,
        Head::LanguageModel { .. } => arch.classes.language_model,
    };
    json["architectures"] = serde_json::json!([class]);
    let object = json.as_object_mut().expect("a configuration is an object");
    object.remove("problem_type");
    if let Head::Classify { outputs, .. } = spec.head {
        // Labels that someone gave this head stay.
        if labels(config).len() != outputs {
            let names: Vec<String> = (0..outputs).map(|i| format!("LABEL_{i}")).collect();
            set_labels(object, &names);
        }
        if outputs == 1 {
            object.insert("problem_type".into(), "regression".into());
        }
    }
    Ok(json)
}

/// The names of a classifier's outputs in their order; empty where the configuration has none.
pub fn labels(config: &Config) -> Vec<String> {
    let Some(map) = config.get("id2label").and_then(Value::as_object) else { return Vec::new() };
    (0..map.len()).filter_map(|i| map.get(&i.to_string())?.as_str().map(str::to_string)).collect()
}

/// Writes the names of a classifier's outputs.
pub(crate) fn set_labels(json: &mut serde_json::Map<String, Value>, names: &[String]) {
    let by_id = names.iter().enumerate().map(|(i, l)| (i.to_string(), Value::from(l.as_str()))).collect();
    let by_name = names.iter().enumerate().map(|(i, l)| (l.clone(), Value::from(i))).collect();
    json.insert("id2label".into(), by_id);
    json.insert("label2id".into(), by_name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sound() {
        for (i, a) in ARCHS.iter().enumerate() {
            assert!(ARCHS[..i].iter().all(|b| b.name != a.name), "two families called {}", a.name);
            assert!(!a.doc.is_empty() && !a.classes.body.is_empty());
        }
    }

    #[test]
    fn unknown_family_lists_the_known_ones() {
        let c = Config::parse(Path::new("x/config.json"), r#"{"model_type":"mamba"}"#).unwrap();
        let e = find(&c).err().unwrap().to_string();
        assert!(e.contains("x/config.json") && e.contains("mamba") && e.contains("distilbert"), "{e}");
    }

    #[test]
    fn a_norm_needs_a_positive_epsilon() {
        let bert = r#""model_type":"bert","num_attention_heads":2,"num_hidden_layers":1,"intermediate_size":8,
            "max_position_embeddings":8,"type_vocab_size":2"#;
        let llama =
            r#""model_type":"llama","num_attention_heads":2,"num_hidden_layers":1,"intermediate_size":8"#;
        let gpt2 = r#""model_type":"gpt2","n_embd":8,"n_head":2,"n_layer":1,"n_positions":8"#;
        let roberta = bert.replace("bert", "roberta");
        let families = [
            (bert, "layer_norm_eps"),
            (&roberta, "layer_norm_eps"),
            (gpt2, "layer_norm_epsilon"),
            (llama, "rms_norm_eps"),
        ];
        for (family, key) in families {
            let read = |eps: &str| {
                let text = format!("{{{family},\"vocab_size\":8,\"hidden_size\":8,\"{key}\":{eps}}}");
                let c = Config::parse(Path::new("config.json"), &text).unwrap();
                (find(&c).unwrap().spec)(&c).map(|_| ()).map_err(|e| e.to_string())
            };
            assert_eq!(read("1e-5"), Ok(()));
            // The last two are 0 and infinite in f32.
            for eps in ["-1", "0", "1e-60", "1e60"] {
                let e = read(eps).unwrap_err();
                assert!(e.contains("config.json") && e.contains(key) && e.contains("positive"), "{e}");
            }
        }
    }

    #[test]
    fn bad_values_name_the_key() {
        for (text, key) in [
            (r#"{"model_type":"bert","vocab_size":0}"#, "vocab_size"),
            (r#"{"model_type":"bert"}"#, "vocab_size"),
            (r#"{"model_type":"bert","vocab_size":"x"}"#, "vocab_size"),
            (
                r#"{"model_type":"bert","vocab_size":10,"hidden_size":10,"num_attention_heads":3}"#,
                "num_attention_heads",
            ),
        ] {
            let c = Config::parse(Path::new("config.json"), text).unwrap();
            let e = (find(&c).unwrap().spec)(&c).unwrap_err().to_string();
            assert!(e.contains(key), "{e}");
        }
        let e = Config::parse(Path::new("config.json"), "{\n oops").unwrap_err().to_string();
        assert!(e.starts_with("config.json:2:"), "{e}");
    }
}
