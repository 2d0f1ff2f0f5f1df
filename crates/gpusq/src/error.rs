//! The library's one error type: each variant names the place and says what to do.

use std::path::{Path, PathBuf};

/// What went wrong, where, and what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}{}", path.display(), hint(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file's content is not what its format allows.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A line of a text file is not what the format allows. Lines count from 1.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what to do.
        message: String,
    },
    /// A named weight is missing, misshapen or holds values that cannot be used.
    #[error("{}: tensor `{name}`: {message}", path.display())]
    Tensor {
        /// The file or folder that holds the weight.
        path: PathBuf,
        /// The tensor's name in that file.
        name: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A setting is unknown or out of range.
    #[error("{0}")]
    Config(String),
    /// Two inputs that are each fine do not fit together (model and task, vocabulary and tokenizer).
    #[error("{0}")]
    Mismatch(String),
}

fn hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => {
            "; free some space or choose another --out, nothing was left half-written"
        }
        std::io::ErrorKind::NotFound => "; check the path",
        std::io::ErrorKind::PermissionDenied => "; you may not read or write it, change its permissions",
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`] about `path`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::File`] about `path`.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Line`] about line `line` (from 1) of `path`.
    pub fn line(path: impl AsRef<Path>, line: usize, message: impl Into<String>) -> Self {
        Error::Line { path: path.as_ref().to_path_buf(), line, message: message.into() }
    }

    /// An [`Error::Tensor`] about `name` in `path`.
    pub fn tensor(path: impl AsRef<Path>, name: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Tensor { path: path.as_ref().to_path_buf(), name: name.into(), message: message.into() }
    }
}

/// `std::result::Result` with the library's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
