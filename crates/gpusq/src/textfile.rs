//! Files of text that people and other programs write.

use std::path::Path;

use crate::{Error, Result};

/// The bytes of a file without a byte order mark.
///
/// # Errors
/// [`Error::Io`] when it cannot be read.
pub(crate) fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(path).map_err(Error::io(path))?;
    let mark = bytes.len() - unmarked(&bytes).len();
    bytes.drain(..mark);
    Ok(bytes)
}

/// The text of a file without a byte order mark.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Line`] where it is not UTF-8.
pub(crate) fn text(path: &Path) -> Result<String> {
    String::from_utf8(bytes(path)?).map_err(|e| {
        let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + before.iter().filter(|b| **b == b'\n').count();
        Error::line(path, line, "is not UTF-8; save the file in that encoding")
    })
}

/// `bytes` without the byte order mark that some editors put before UTF-8.
pub(crate) fn unmarked(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_dropped_and_other_encodings_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "\u{feff}a\u{feff}\n").unwrap();
        assert_eq!(text(&path).unwrap(), "a\u{feff}\n");
        std::fs::write(&path, b"a\nb\xe9\n").unwrap();
        let error = text(&path).unwrap_err().to_string();
        assert!(error.contains("a.txt:2: is not UTF-8"), "{error}");
        let error = text(dir.path()).unwrap_err().to_string();
        assert!(error.contains("give a file"), "{error}");
    }
}
