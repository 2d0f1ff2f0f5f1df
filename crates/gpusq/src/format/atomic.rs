//! Files and folders that appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::{Error, Result};

/// How the names of files that are being written end; they begin with a dot.
const PARTIAL: &str = ".tmp";

/// Writes the file `path` through `content` so that a reader, now or after a crash, sees the old file or
/// the whole new one.
///
/// The bytes go to a hidden temporary file in the same folder, which is synced and renamed; on any error
/// it is removed. A symbolic link at `path` is replaced, not followed.
///
/// # Errors
/// [`Error::Io`] naming `path`, with the system's reason.
pub fn write_file(
    path: impl AsRef<Path>,
    content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let folder = parent(path);
    let name = path.file_name().ok_or_else(|| Error::file(path, "is a folder, not the name of a file"))?;
    let write = || -> io::Result<()> {
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(PARTIAL);
        // The default of temporary files, 0600, would leave models that colleagues cannot read.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        // Its error names the temporary file; the user asked for another.
        let temp = builder.tempfile_in(folder).map_err(|e| io::Error::from(e.kind()))?;
        let mut buffered = BufWriter::with_capacity(1 << 20, temp.as_file());
        content(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        temp.as_file().sync_all()?;
        temp.persist(path)?;
        sync_folder(folder)
    };
    write().map_err(Error::io(path))
}

/// Bytes that may still be written where `path` is or will be, or `None` if the system does not say.
pub fn free_space(path: impl AsRef<Path>) -> Option<u64> {
    let path = std::path::absolute(path).ok()?;
    fs4::available_space(path.ancestors().find(|p| p.exists())?).ok()
}

/// Removes what [`write_file`] and the report left half-written in `folder` and the folders in it when the
/// process was killed. For a caller that knows no other process is writing there.
///
/// # Errors
/// [`Error::Io`] when a folder cannot be read or a file not removed.
pub(crate) fn remove_partial(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        // Does not follow links.
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            remove_partial(&path)?;
        } else if kind.is_file() && name.starts_with('.') && name.ends_with(PARTIAL) {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename inside `folder` survive a power cut, where the file system can.
fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot sync a folder.
        Err(e) if !matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Err(e),
        _ => Ok(()),
    }
    #[cfg(not(unix))]
    {
        let _ = File::open(folder);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A small file system, or `None` where mounting is not allowed.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn mount(size: &str) -> Option<Tmpfs> {
            let dir = tempfile::tempdir().unwrap();
            let options = format!("size={size}");
            let mounted = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
                .arg(dir.path())
                .output();
            match mounted {
                Ok(out) if out.status.success() => Some(Tmpfs(dir)),
                _ => {
                    eprintln!("skipped: mounting a small tmpfs is not allowed here");
                    None
                }
            }
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(self.0.path()).output();
        }
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_file(&path, |w| w.write_all(b"old")).unwrap();
        write_file(&path, |w| w.write_all(b"newer")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newer");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn the_temporary_file_is_hidden_beside_the_target() {
        let dir = tempfile::tempdir().unwrap();
        write_file(dir.path().join("a.bin"), |w| {
            w.write_all(b"x")?;
            let seen = names(dir.path());
            assert!(
                seen.len() == 1 && seen[0].starts_with(".a.bin.") && seen[0].ends_with(".tmp"),
                "{seen:?}"
            );
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_file(&path, |w| w.write_all(b"old")).unwrap();
        let error = write_file(&path, |w| {
            w.write_all(&[0; 3 << 20])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("a.bin") && error.contains("free some space"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn a_missing_folder_is_named_without_the_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/a.bin");
        let error = write_file(&path, |w| w.write_all(b"x")).unwrap_err();
        assert!(matches!(&error, Error::Io { path: p, source } if *p == path
            && source.kind() == io::ErrorKind::NotFound));
        assert!(!error.to_string().contains(".a.bin"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn written_files_follow_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write_file(&ours, |w| w.write_all(b"x")).unwrap();
        fs::write(&plain, b"x").unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn a_full_disk_is_one_clear_error_and_leaves_nothing() {
        let Some(disk) = Tmpfs::mount("1m") else { return };
        let path = disk.0.path().join("a.bin");
        write_file(&path, |w| w.write_all(b"old")).unwrap();
        let error = write_file(&path, |w| w.write_all(&[7; 4 << 20])).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path: p, source } if *p == path
            && source.kind() == io::ErrorKind::StorageFull),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(
            text.contains("a.bin") && !text.contains(".a.bin") && text.contains("free some space"),
            "{text}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(disk.0.path()), ["a.bin"]);
        // What was taken is given back, apart from the few pages that the system counts late.
        write_file(&path, |w| w.write_all(&[7; 512 << 10])).unwrap();
    }

    #[test]
    fn free_space_is_known_for_a_folder_that_does_not_exist_yet() {
        let dir = tempfile::tempdir().unwrap();
        let Some(here) = free_space(dir.path()) else {
            eprintln!("skipped: this system does not tell free space");
            return;
        };
        assert!(here > 0);
        assert!(free_space(dir.path().join("not/yet")).is_some());
        if let Some(disk) = Tmpfs::mount("64k") {
            assert!(free_space(disk.0.path()).unwrap() <= 64 << 10);
        }
    }
}
