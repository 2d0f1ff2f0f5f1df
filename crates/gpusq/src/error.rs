//! The library's one error type: each variant names the place and says what to do.

use std::path::{Path, PathBuf};

/// What went wrong, where, and what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}{}", line(path.display()), hint(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file's content is not what its format allows.
    #[error("{}: {}", line(path.display()), line(message))]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A line of a text file is not what the format allows. Lines count from 1.
    #[error("{}:{line}: {}", self::line(path.display()), self::line(message))]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what to do.
        message: String,
    },
    /// A named weight is missing, misshapen or holds values that cannot be used.
    #[error("{}: tensor `{}`: {}", line(path.display()), line(name), line(message))]
    Tensor {
        /// The file or folder that holds the weight.
        path: PathBuf,
        /// The tensor's name in that file.
        name: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A setting is unknown or out of range.
    #[error("{}", line(.0))]
    Config(String),
    /// A GPU cannot be used, or stopped working.
    #[error("{}", line(.0))]
    Device(#[from] gpusq_tensor::cuda::CudaError),
    /// Processes that train together cannot any more.
    #[error("{}{}", line(.0), if .0.elsewhere() { "; run the command again with --resume to go on from the last checkpoint" } else { "" })]
    Group(#[from] gpusq_tensor::GroupError),
    /// Two inputs that are each fine do not fit together (model and task, vocabulary and tokenizer).
    #[error("{}", line(.0))]
    Mismatch(String),
}

/// `text` without line ends and other control characters: messages quote files, which may hold anything, and
/// a message is one line that leaves a terminal alone.
fn line(text: impl std::fmt::Display) -> String {
    let text = text.to_string();
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    if text.contains(char::is_control) { text.chars().map(escaped).collect() } else { text }
}

fn hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => {
            "; free some space or choose another --out, nothing was left half-written"
        }
        std::io::ErrorKind::NotFound => "; check the path",
        std::io::ErrorKind::IsADirectory => "; this is a folder, give a file",
        std::io::ErrorKind::NotADirectory => "; a part of the path is a file, check the path",
        std::io::ErrorKind::ReadOnlyFilesystem => "; nothing can be written there, choose another --out",
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

#[cfg(test)]
mod tests {
    use super::Error;

    #[test]
    fn a_message_is_one_line_whatever_it_quotes() {
        let error = Error::line("a\nb.tsv", 3, "label `\r\u{1b}[2J\u{e9}` is unknown");
        assert_eq!(error.to_string(), "a\\nb.tsv:3: label `\\r\\u{1b}[2J\u{e9}` is unknown");
        assert_eq!(Error::Config("x\ty".into()).to_string(), "x\\ty");
    }

    #[test]
    fn what_can_be_done_about_a_refusal_of_the_system_is_said() {
        use std::io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem, StorageFull};
        for (kind, advice) in [
            (NotFound, "check the path"),
            (PermissionDenied, "change its permissions"),
            (ReadOnlyFilesystem, "choose another --out"),
            (StorageFull, "free some space"),
        ] {
            let error = Error::io("out/state")(kind.into()).to_string();
            assert!(error.starts_with("out/state: ") && error.contains(advice), "{error}");
        }
    }
}
