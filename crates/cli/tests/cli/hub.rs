//! Models by hub name, from a hub of a few lines on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::json;

use crate::tiny::{Done, data, dense, finish, program, tree};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub that has one model, `org/tiny`, for those with the token.
struct Hub {
    address: String,
    /// Request lines in the order they came.
    seen: Arc<Mutex<Vec<String>>>,
}

fn serve(files: BTreeMap<String, Vec<u8>>, token: Option<&'static str>) -> Hub {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client may hang up when it has what it needs.
            let _ = answer(stream.unwrap(), &files, token, &log);
        }
    });
    Hub { address, seen }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    token: Option<&str>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let headers: Vec<String> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
    log.lock().unwrap().push(request.clone());
    let header = |name: &str| {
        let found =
            headers.iter().find_map(|h| h.split_once(": ").filter(|(k, _)| k.eq_ignore_ascii_case(name)));
        found.map(|(_, v)| v.to_string())
    };
    let path = request.split(' ').nth(1).unwrap_or_default();
    let mut send = |status: &str, more: &str, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{more}\r\n", body.len());
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body))
    };
    if token.is_some_and(|t| header("authorization") != Some(format!("Bearer {t}"))) {
        return send("401 Unauthorized", "", b"");
    }
    if path.starts_with("/api/models/org/tiny") {
        let siblings: Vec<_> = files.keys().map(|f| json!({ "rfilename": f })).collect();
        return send("200 OK", "", json!({ "siblings": siblings, "sha": COMMIT }).to_string().as_bytes());
    }
    let Some(file) = path.strip_prefix("/org/tiny/resolve/main/").and_then(|f| files.get_key_value(f)) else {
        return send("404 Not Found", "", b"");
    };
    let (name, bytes) = file;
    let range = header("range").unwrap_or_default();
    let (from, to) = range.trim_start_matches("bytes=").split_once('-').unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap_or(0).min(bytes.len());
    let to = to.parse::<usize>().map_or(bytes.len(), |t| (t + 1).min(bytes.len()));
    let more = format!(
        "ETag: \"etag-{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {from}-{}/{}\r\n",
        name.replace('.', "-"),
        to.saturating_sub(1),
        bytes.len()
    );
    send("206 Partial Content", &more, &bytes[from..to])
}

/// The files of the fine-tuned model.
fn files() -> BTreeMap<String, Vec<u8>> {
    let mut files = tree(&dense());
    files.retain(|name, _| !name.contains('/'));
    files
}

fn eval(home: &Path, env: &[(&str, &str)]) -> Done {
    let d = data();
    let args = ["eval", "--model", "org/tiny", "--task", "sst2", "--data", d.to_str().unwrap(), "--json"];
    let mut c = program(&args.map(String::from));
    c.env_remove("HF_HUB_OFFLINE").env("HF_HOME", home).envs(env.iter().copied());
    finish(&mut c)
}

#[test]
fn a_model_is_downloaded_once_and_found_again_without_a_network() {
    let dir = tempfile::tempdir().unwrap();
    let hub = serve(files(), None);
    let first = eval(dir.path(), &[("HF_ENDPOINT", &hub.address)]);
    first.ok();
    let folder = PathBuf::from(first.event("scored")["model"].as_str().unwrap());
    assert!(folder.starts_with(dir.path().join("hub")), "{}", folder.display());
    for name in ["config.json", "model.safetensors", "vocab.txt", "gpusq.json"] {
        assert!(
            std::fs::read(folder.join(name)).unwrap() == std::fs::read(dense().join(name)).unwrap(),
            "{name}"
        );
    }
    assert!(!folder.join("report.html").exists(), "only what a model needs");
    // Again: the hub is asked what it has, and no file is fetched.
    hub.seen.lock().unwrap().clear();
    let second = eval(dir.path(), &[("HF_ENDPOINT", &hub.address)]);
    second.ok();
    assert!(hub.seen.lock().unwrap().iter().all(|r| r.contains("/api/models/")));
    let scores = &first.event("scored")["scores"];
    assert_eq!(&second.event("scored")["scores"], scores);
    hub.seen.lock().unwrap().clear();
    for env in [
        &[("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", &hub.address)][..],
        &[("HF_ENDPOINT", "http://127.0.0.1:9")],
    ] {
        let again = eval(dir.path(), env);
        again.ok();
        assert_eq!(&again.event("scored")["scores"], scores);
    }
    assert!(hub.seen.lock().unwrap().is_empty());
}

#[test]
fn shards_are_downloaded_as_the_index_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = files();
    let checkpoint = gpusq::format::safetensors::Checkpoint::open(dense()).unwrap();
    let tensors: Vec<_> =
        checkpoint.names().map(|n| (n.to_string(), checkpoint.tensor(n).unwrap())).collect();
    files.remove("model.safetensors");
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let path = dir.path().join(&name);
        gpusq::format::safetensors::write_safetensors(&path, part, &Default::default()).unwrap();
        files.insert(name.clone(), std::fs::read(path).unwrap());
        map.extend(part.iter().map(|(n, _)| (n.clone(), name.clone().into())));
    }
    let index = json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes();
    files.insert("model.safetensors.index.json".into(), index);
    let hub = serve(files, None);
    eval(&dir.path().join("home"), &[("HF_ENDPOINT", &hub.address)]).ok();
    eval(&dir.path().join("home"), &[("HF_HUB_OFFLINE", "1")]).ok();
}

#[test]
fn what_the_hub_does_not_give_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path();
    eval(home, &[("HF_HUB_OFFLINE", "1")]).fails(1, &["org/tiny", "no such folder", "HF_HUB_OFFLINE"]);
    eval(home, &[("HF_ENDPOINT", "http://127.0.0.1:9")])
        .fails(1, &["org/tiny", "no such folder", "not reached"]);
    let closed = serve(files(), Some("secret"));
    eval(home, &[("HF_ENDPOINT", &closed.address)]).fails(1, &["org/tiny", "401", "HF_TOKEN"]);
    let wrong = [("HF_ENDPOINT", closed.address.as_str()), ("HF_TOKEN", "guess")];
    eval(home, &wrong).fails(1, &["org/tiny", "401"]);
    let other = serve(BTreeMap::new(), None);
    let mut without = files();
    without.remove("model.safetensors");
    let old = serve(without, None);
    eval(home, &[("HF_ENDPOINT", &other.address)]).fails(1, &["org/tiny", "no config.json"]);
    eval(home, &[("HF_ENDPOINT", &old.address)]).fails(1, &["org/tiny", "no safetensors", "save_pretrained"]);
    eval(home, &[("HF_ENDPOINT", "not a url")]).fails(1, &["org/tiny"]);
    let args = ["inspect", "org/absent", "--json"].map(String::from);
    let mut c = program(&args);
    c.env_remove("HF_HUB_OFFLINE").env("HF_HOME", home).env("HF_ENDPOINT", &other.address);
    finish(&mut c).fails(1, &["org/absent", "the hub has no model of that name"]);
    for path in ["./no/such/folder", "/no/such"] {
        let done = finish(&mut program(&["inspect", path, "--json"].map(String::from)));
        done.fails(1, &[path, "no such folder"]);
    }
    eval(home, &[("HF_ENDPOINT", &closed.address), ("HF_TOKEN", "secret")]).ok();
}
