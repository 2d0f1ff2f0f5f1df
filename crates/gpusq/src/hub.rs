//! Where a model is: a folder, or a name on the Hugging Face hub, whose files are downloaded once and kept.
//!
//! As other programs for the hub do, it keeps files in `$HF_HOME/hub` (default `~/.cache/huggingface/hub`),
//! asks `$HF_ENDPOINT` instead of huggingface.co, sends `$HF_TOKEN`, and never uses the network where
//! `$HF_HUB_OFFLINE` is 1.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};

use crate::format::safetensors::parse_index;
use crate::model::{MANIFEST_FILE, PACKED_FILE, TOKENIZER_FILES};
use crate::{Error, Result};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The folder of `model`: `model` itself if it is there, else the folder that the files of the hub's model
/// of that name (`bert-base-uncased`, `org/name`) are in after downloading those that are missing.
///
/// # Errors
/// [`Error::File`] naming `model`: neither a folder nor the form of a hub name, a model the hub does not
/// have or give, one without safetensors weights, no network and not downloaded before.
pub fn resolve(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if !is_hub_name(model) {
        return Err(Error::file(
            path,
            "there is no such folder, and it is not the form of a hub name; check the path",
        ));
    }
    let cache = Cache::from_env();
    if offline() {
        return cached(&cache, model).ok_or_else(|| {
            let message = format!(
                "there is no such folder, and the hub's model of that name is not whole in {} while HF_HUB_OFFLINE is \
                 set; unset it, or give a folder",
                cache.path().display()
            );
            Error::file(path, message)
        });
    }
    match download(&cache, model) {
        // Without a network, what was downloaded before serves.
        Err(Failure::Unreachable(reason)) => cached(&cache, model).ok_or_else(|| {
            let message = format!(
                "there is no such folder, and the hub was not reached ({reason}); check path and network, or give a \
                 folder"
            );
            Error::file(path, message)
        }),
        Err(Failure::Final(error)) => Err(error),
        Ok(folder) => Ok(folder),
    }
}

/// Whether `text` is `name` or `org/name` as the hub spells names.
fn is_hub_name(text: &str) -> bool {
    let part = |p: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !p.is_empty()
            && p.len() <= 96
            && p.chars().all(plain)
            && !p.starts_with(['.', '-'])
            && !p.ends_with('.')
    };
    let parts: Vec<&str> = text.split('/').collect();
    parts.len() <= 2 && parts.iter().all(|p| part(p)) && !text.contains("..")
}

fn offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    ["1", "true", "yes", "on"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

/// The folder of a model that was downloaded whole before.
fn cached(cache: &Cache, model: &str) -> Option<PathBuf> {
    let repo = cache.repo(Repo::model(model.to_string()));
    let folder = repo.get("config.json")?.parent()?.to_path_buf();
    let whole = folder.join(WEIGHTS).exists() || folder.join(PACKED_FILE).exists() || {
        let index = folder.join(INDEX);
        let bytes = std::fs::read(&index).ok()?;
        parse_index(&index, &bytes).ok()?.values().all(|shard| folder.join(shard).exists())
    };
    whole.then_some(folder)
}

enum Failure {
    /// The hub did not answer.
    Unreachable(String),
    Final(Error),
}

fn download(cache: &Cache, model: &str) -> std::result::Result<PathBuf, Failure> {
    let fail = |message: String| Failure::Final(Error::file(model, message));
    let mut builder = ApiBuilder::from_env();
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|t| !t.trim().is_empty()) {
        builder = builder.with_token(Some(token.trim().to_string()));
    }
    let api: Api = builder.build().map_err(|e| fail(format!("the hub cannot be used: {}", line(&e))))?;
    let name = Repo::model(model.to_string());
    let remote = api.repo(name.clone());
    let info = remote.info().map_err(|e| failure(model, &e))?;
    if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_hexdigit()) {
        return Err(fail("the hub's answer names no commit; check HF_ENDPOINT".into()));
    }
    let has = |file: &str| info.siblings.iter().any(|s| s.rfilename == file);
    if !has("config.json") {
        return Err(fail("the hub's model has no config.json; only transformers models can be used".into()));
    }
    let folder = cache.repo(name).pointer_path(&info.sha);
    let get = |file: &str| fetch(&remote, model, &folder, file);
    // Small files first: what is wrong with them shows before the weights are downloaded.
    for file in ["config.json", MANIFEST_FILE].iter().chain(TOKENIZER_FILES).filter(|f| has(f)) {
        get(file)?;
    }
    if has(PACKED_FILE) {
        get(PACKED_FILE)?;
    } else if has(WEIGHTS) {
        get(WEIGHTS)?;
    } else if has(INDEX) {
        let index = get(INDEX)?;
        let bytes = std::fs::read(&index).map_err(|e| Failure::Final(Error::io(&index)(e)))?;
        let mut shards: Vec<String> =
            parse_index(&index, &bytes).map_err(Failure::Final)?.into_values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            get(&shard)?;
        }
    } else {
        return Err(fail(
            "the hub's model has no safetensors weights; convert it in Python with transformers: \
             AutoModel...from_pretrained(NAME).save_pretrained(DIR), and use DIR"
                .into(),
        ));
    }
    Ok(folder)
}

/// Downloads `file` unless it is in `folder` already.
fn fetch(remote: &ApiRepo, model: &str, folder: &Path, file: &str) -> std::result::Result<PathBuf, Failure> {
    let wanted = folder.join(file);
    if wanted.exists() {
        return Ok(wanted);
    }
    let got = remote.download(file).map_err(|e| failure(&format!("{model}: {file}"), &e))?;
    if got != wanted {
        let message = "the hub's model changed while it was downloaded; run the command again";
        return Err(Failure::Final(Error::file(model, message)));
    }
    Ok(got)
}

fn failure(what: &str, error: &ApiError) -> Failure {
    let fail = |message: String| Failure::Final(Error::file(what, message));
    let ApiError::RequestError(request) = error else {
        return fail(format!("could not be downloaded: {}; run the command again", line(error)));
    };
    match &**request {
        ureq::Error::StatusCode(404) => {
            fail("there is no such folder, and the hub has no model of that name; check the spelling".into())
        }
        ureq::Error::StatusCode(code @ (401 | 403)) => fail(format!(
            "there is no such folder, and the hub does not give a model of that name (status {code}); check the \
             spelling, or set HF_TOKEN to a token that may read it"
        )),
        _ => Failure::Unreachable(line(error)),
    }
}

/// An error of the network as part of one line.
fn line(error: &ApiError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_names_are_told_from_paths() {
        for name in ["gpt2", "bert-base-uncased", "org/name", "sentence-transformers/all-MiniLM-L6-v2"] {
            assert!(is_hub_name(name), "{name}");
        }
        for path in ["", "./x", "/abs/x", "a/b/c", "..", "a/..", "~/x", "a b", "-x", "a//b", "x/", "a\n"] {
            assert!(!is_hub_name(path), "{path}");
        }
    }

    #[test]
    fn a_folder_is_itself() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(resolve(dir.path().to_str().unwrap()).unwrap(), dir.path());
    }
}
