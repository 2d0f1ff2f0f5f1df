//! Checkpoints that name the same tensors in other ways load as the same model.

use std::collections::BTreeMap;
use std::path::Path;

use gpusq::arch::Config;
use gpusq::format::safetensors::{Checkpoint, write_safetensors};
use gpusq::model::Model;

const CONFIG: &str = r#"{"model_type":"bert","architectures":["BertForMaskedLM"],"vocab_size":24,
    "hidden_size":8,"num_hidden_layers":1,"num_attention_heads":2,"intermediate_size":16,
    "max_position_embeddings":16}"#;

/// `early`: a norm's weight and bias are called gamma and beta, as in bert-base-uncased. `bare`: names lack
/// the family's prefix, as in a checkpoint of the body alone.
#[test]
fn early_and_bare_names_load_as_the_usual_ones() {
    let model = Model::random(Config::parse(Path::new("config.json"), CONFIG).unwrap(), 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), None).unwrap();
    let usual = Model::load(dir.path()).unwrap();
    let file = dir.path().join("model.safetensors");
    let stored = Checkpoint::open_file(&file).unwrap();
    let tensors: Vec<_> = stored.names().map(|n| (n.to_string(), stored.tensor(n).unwrap())).collect();
    assert!(tensors.iter().any(|(n, _)| n.ends_with("LayerNorm.weight")));
    for (early, bare) in [(true, false), (false, true), (true, true)] {
        let rename = |n: &str| {
            let n = if bare { n.strip_prefix("bert.").unwrap_or(n) } else { n };
            match early {
                true => n
                    .replace("LayerNorm.weight", "LayerNorm.gamma")
                    .replace("LayerNorm.bias", "LayerNorm.beta"),
                false => n.to_string(),
            }
        };
        let renamed: Vec<_> = tensors.iter().map(|(n, t)| (rename(n), t.clone())).collect();
        write_safetensors(&file, &renamed, &BTreeMap::new()).unwrap();
        let loaded = Model::load(dir.path()).unwrap();
        assert_eq!(loaded.params, usual.params, "early {early}, bare {bare}");
        assert!(loaded.unused.is_empty(), "{:?}", loaded.unused);
    }
}
