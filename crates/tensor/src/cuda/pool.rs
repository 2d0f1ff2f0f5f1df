//! Memory that operations free and ask for again, by size class: the driver's own allocator costs as much as the
//! launch of a small kernel. All work of a GPU is in one stream, so what one operation frees the next may use.

use std::collections::HashMap;

use cudarc::driver::sys::CUdeviceptr;

/// Classes are multiples of this.
const SMALLEST: usize = 512;

#[derive(Default)]
pub(super) struct Pool {
    free: HashMap<usize, Vec<CUdeviceptr>>,
    /// The how-manieth from the driver each is.
    age: HashMap<CUdeviceptr, usize>,
    made: usize,
    used: usize,
    peak: usize,
}

/// The smallest class that holds `bytes`: eight to each power of two, so that at most an eighth is idle while batches
/// of nearby lengths still share memory.
fn class(bytes: usize) -> usize {
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(SMALLEST))
}

impl Pool {
    /// Free memory for `bytes`, if there is some, and else how many bytes to ask the driver for. Either counts as used
    /// from now on.
    pub(super) fn take(&mut self, bytes: usize) -> Result<CUdeviceptr, usize> {
        let class = class(bytes);
        self.used += class;
        self.peak = self.peak.max(self.used);
        self.free.get_mut(&class).and_then(Vec::pop).ok_or(class)
    }

    /// Memory for `bytes` is no longer used, or was not to be had (`None`).
    pub(super) fn give(&mut self, bytes: usize, at: Option<CUdeviceptr>) {
        let class = class(bytes);
        self.used -= class;
        if let Some(at) = at {
            self.free.entry(class).or_default().push(at);
        }
    }

    /// The driver gave memory at `at`.
    pub(super) fn made(&mut self, at: CUdeviceptr) {
        self.age.insert(at, self.made);
        self.made += 1;
    }

    /// Lets free memory be taken from the oldest on. Who takes and gives in one order after this gets the same memory
    /// each time, whatever was free besides.
    pub(super) fn settle(&mut self) {
        for list in self.free.values_mut() {
            list.sort_unstable_by_key(|at| std::cmp::Reverse(self.age.get(at)));
        }
    }

    /// All free memory, to hand back to the driver.
    pub(super) fn drain(&mut self) -> Vec<CUdeviceptr> {
        let all: Vec<_> = self.free.drain().flat_map(|(_, list)| list).collect();
        for at in &all {
            self.age.remove(at);
        }
        all
    }

    /// The most bytes that were used at one time since the last call.
    pub(super) fn peak(&mut self) -> usize {
        std::mem::replace(&mut self.peak, self.used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_comes_back_to_those_of_its_class() {
        let mut pool = Pool::default();
        assert_eq!(pool.take(1000), Err(1024));
        pool.give(1000, Some(7));
        assert_eq!(pool.take(100), Err(512));
        assert_eq!(pool.take(1020), Ok(7));
        assert_eq!(pool.take(1020), Err(1024));
        pool.give(1020, None);
        assert_eq!((pool.used, pool.peak()), (1536, 2560));
        assert_eq!(pool.peak(), 1536);
        pool.made(7);
        pool.give(1020, Some(7));
        assert_eq!(pool.drain(), [7]);
        assert!(pool.age.is_empty());
    }

    #[test]
    fn the_same_requests_get_the_same_memory_once_settled() {
        let mut pool = Pool::default();
        let mut next = 1000;
        // Takes and gives in one order; `more` is taken besides.
        let mut pass = |pool: &mut Pool, more: usize| {
            pool.settle();
            let mut take = |pool: &mut Pool| {
                pool.take(512).unwrap_or_else(|_| {
                    // Addresses do not rise with age.
                    next -= 7;
                    pool.made(next);
                    next
                })
            };
            let [a, b] = [0; 2].map(|_| take(pool));
            pool.give(512, Some(a));
            let c = take(pool);
            let more: Vec<u64> = (0..more).map(|_| take(pool)).collect();
            [c, b].into_iter().chain(more).for_each(|at| pool.give(512, Some(at)));
            [a, b, c]
        };
        let first = pass(&mut pool, 0);
        assert_eq!(pass(&mut pool, 3), first);
        assert_eq!(pass(&mut pool, 0), first);
    }

    #[test]
    fn classes_hold_their_bytes_and_waste_little() {
        for bytes in [1, 511, 512, 513, 5000, 65_536, 65_537, 1_000_003, 123_456_789] {
            let c = class(bytes);
            assert!(c >= bytes && c.is_multiple_of(SMALLEST) && class(c) == c, "{bytes}: {c}");
            assert!(c - bytes < SMALLEST || (c - bytes) * 8 <= c, "{bytes}: {c}");
        }
    }
}
