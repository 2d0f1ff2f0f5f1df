//! Recycled `f32` buffers.
//!
//! A training step allocates the same few hundred large buffers every time. Handing them back to the
//! system means page faults on each of them in the next step, which cost more than many of the
//! operations that fill them, so freed buffers are kept by size class and handed out again.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Buffers below this many elements come from the system allocator: it is quick at small sizes.
const SMALL: usize = 4096;
/// Free elements kept over all classes (256 Mi elements = 1 GiB); beyond it buffers are released.
const KEEP: usize = 256 << 20;

struct Free {
    classes: Vec<(usize, Vec<Vec<f32>>)>,
    elements: usize,
}

static FREE: Mutex<Free> = Mutex::new(Free { classes: Vec::new(), elements: 0 });

/// An `f32` buffer that returns to the pool when dropped.
pub(crate) struct Buffer {
    data: Vec<f32>,
    len: usize,
}

/// The smallest class holding `len` elements: eight classes to each power of two, so that at most an
/// eighth of a buffer is idle while batches of nearby lengths still share buffers.
fn class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.div_ceil(step) * step
}

impl Buffer {
    /// A buffer of `len` elements whose content is whatever an earlier user left there.
    pub(crate) fn stale(len: usize) -> Self {
        if len < SMALL {
            return Buffer { data: vec![0.0; len], len };
        }
        let class = class(len);
        let mut free = FREE.lock().unwrap_or_else(|e| e.into_inner());
        let found = match free.classes.binary_search_by_key(&class, |c| c.0) {
            Ok(i) => free.classes[i].1.pop(),
            Err(_) => None,
        };
        if found.is_some() {
            free.elements -= class;
        }
        drop(free);
        #[allow(unused_mut)]
        let mut data = found.unwrap_or_else(|| vec![0.0; class]);
        // A reader of elements that nobody wrote must fail in tests, not read yesterday's values.
        #[cfg(debug_assertions)]
        data.fill(f32::NAN);
        Buffer { data, len }
    }

    pub(crate) fn zeroed(len: usize) -> Self {
        let mut b = Self::stale(len);
        b.fill(0.0);
        b
    }

    pub(crate) fn from_vec(data: Vec<f32>) -> Self {
        Buffer { len: data.len(), data }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let n = self.data.len();
        if n < SMALL || class(n) != n {
            return;
        }
        let mut free = FREE.lock().unwrap_or_else(|e| e.into_inner());
        if free.elements + n > KEEP {
            return;
        }
        free.elements += n;
        let data = std::mem::take(&mut self.data);
        match free.classes.binary_search_by_key(&n, |c| c.0) {
            Ok(i) => free.classes[i].1.push(data),
            Err(i) => free.classes.insert(i, (n, vec![data])),
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut b = Buffer::stale(self.len);
        b.copy_from_slice(self);
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_their_length_and_waste_little() {
        for len in [SMALL, SMALL + 1, 5000, 65536, 65537, 1_000_003] {
            let c = class(len);
            assert!(c >= len && (c - len) * 8 <= c, "{len} -> {c}");
            assert_eq!(class(c), c, "a class must be its own class, or buffers never come back");
        }
    }

    #[test]
    fn zeroed_is_zero_after_reuse() {
        let mut b = Buffer::stale(10_000);
        b.fill(3.0);
        drop(b);
        assert!(Buffer::zeroed(10_000).iter().all(|&x| x == 0.0));
    }
}
