//! Checksums of the tensors that this program writes (FORMAT.md, "Checksums"), so that damage on a disk or on
//! the way shows when a tensor is read, rather than as a score that is a little worse.
//!
//! CRC-32 is enough against accidents: it misses no burst of up to 32 bits. `crc32fast` computes it faster than
//! any disk reads, which a cryptographic hash would not.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use rayon::prelude::*;

use super::writer::{Stored, write_elements};
use super::{bad, shown};
use crate::{Error, Result};

/// What comes before a tensor's name in the metadata key of its checksum.
const PREFIX: &str = "gpusq.crc32.";

/// The checksum of bytes that come in pieces.
#[derive(Default)]
pub(super) struct Sum(crc32fast::Hasher);

impl Sum {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn value(self) -> u32 {
        self.0.finalize()
    }
}

impl Write for Sum {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The checksum of `bytes` as a file has it.
pub(crate) fn checksum(bytes: &[u8]) -> String {
    written(crc32fast::hash(bytes))
}

fn written(sum: u32) -> String {
    format!("{sum:08x}")
}

/// `metadata` and the checksums of `tensors`.
pub(in crate::format) fn with_checksums(
    path: &Path,
    tensors: &[Stored],
    metadata: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    if let Some(key) = metadata.keys().find(|k| k.starts_with(PREFIX)) {
        return Err(Error::file(path, format!("the metadata key `{}` is set by the format", shown(key))));
    }
    // The header comes before the elements, so that these are turned into bytes twice.
    let sums = tensors.par_iter().map(|t| {
        let mut sum = Sum::default();
        write_elements(&mut sum, t).expect("nothing is written");
        (format!("{PREFIX}{}", t.name), written(sum.value()))
    });
    let mut all = metadata.clone();
    all.extend(sums.collect::<Vec<_>>());
    Ok(all)
}

/// Takes the checksums out of `metadata`, by tensor. `there` says which tensors the file has.
pub(super) fn take(
    path: &Path,
    metadata: &mut BTreeMap<String, String>,
    there: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, u32>> {
    let mut sums = BTreeMap::new();
    let ours: Vec<String> = metadata.keys().filter(|k| k.starts_with(PREFIX)).cloned().collect();
    for key in ours {
        let text = metadata.remove(&key).unwrap_or_default();
        let name = &key[PREFIX.len()..];
        if !there(name) {
            return Err(bad(path, name, format!("is not there, but has a checksum; {DAMAGED}")));
        }
        let sum = u32::from_str_radix(&text, 16).ok().filter(|sum| written(*sum) == text);
        let sum = sum.ok_or_else(|| {
            bad(path, name, format!("its checksum `{}` is not 8 hexadecimal digits; {DAMAGED}", shown(&text)))
        })?;
        sums.insert(name.to_string(), sum);
    }
    Ok(sums)
}

/// Says that bytes with the sum `found` are not those that were written.
pub(super) fn differs(path: &Path, name: &str, stored: u32, found: u32) -> Error {
    let (stored, found) = (written(stored), written(found));
    let message = format!("its bytes have the checksum {found}, and {stored} was written; {DAMAGED}");
    bad(path, name, message)
}

const DAMAGED: &str = "the file is damaged, copy it again from its source or make it again";
