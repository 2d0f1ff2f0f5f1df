//! Which elements survive: keep:of patterns and the masks they make.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// `keep` of every `of` neighbours survive, written `keep:of`. (The paper writes N:M both ways round;
/// here the first number is always what is kept.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern {
    /// Survivors of each group.
    pub keep: usize,
    /// Size of a group: a power of two up to 256.
    pub of: usize,
}

impl Pattern {
    /// The weights' pattern, the one that sparse tensor cores compute.
    pub const TWO_FOUR: Pattern = Pattern { keep: 2, of: 4 };

    /// The pattern `keep:of`.
    ///
    /// # Errors
    /// [`Error::Config`] unless `0 < keep < of` and `of` is a power of two up to 256.
    pub fn new(keep: usize, of: usize) -> Result<Self> {
        if 0 < keep && keep < of && of.is_power_of_two() && of <= 256 {
            return Ok(Pattern { keep, of });
        }
        Err(Error::Config(format!("no pattern `{keep}:{of}`: {RULE}")))
    }
}

const RULE: &str = "write keep:of with 0 < keep < of and `of` a power of two up to 256, for example 2:4";

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once(':').and_then(|(keep, of)| Some((keep.parse().ok()?, of.parse().ok()?)));
        let (keep, of) = parts.ok_or_else(|| Error::Config(format!("`{text}` is no pattern: {RULE}")))?;
        Pattern::new(keep, of)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.keep, self.of)
    }
}

impl TryFrom<String> for Pattern {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.to_string()
    }
}

/// Rows that a thread takes at a time.
const ROWS: usize = 16;

/// Writes the mask of `values`, rows of `row_len` elements: 1 for the `keep` largest magnitudes of each
/// `of` neighbours in a row, 0 for the others.
///
/// Groups start at the beginning of every row; a short last group keeps `min(keep, its length)`. Of equal
/// magnitudes the lower index survives; NaN counts as smaller than everything, so a group has its full
/// number of survivors whatever it holds. Panics if `row_len` is 0 or does not divide the length, or if
/// `mask` has another length.
pub fn mask_rows(values: &[f32], row_len: usize, pattern: Pattern, mask: &mut [u8]) {
    assert!(
        row_len > 0 && values.len().is_multiple_of(row_len),
        "{} values, rows of {row_len}",
        values.len()
    );
    assert_eq!(values.len(), mask.len(), "mask of another length than the values");
    let size = |x: f32| if x.is_nan() { -1.0 } else { x.abs() };
    values.par_chunks(row_len).zip(mask.par_chunks_mut(row_len)).with_min_len(ROWS).for_each(
        |(values, mask)| {
            let (mut values, mut mask) = (values, mask);
            if pattern == Pattern::TWO_FOUR {
                let (fours, rest) = values.as_chunks::<4>();
                let (masks, rest_of_mask) = mask.as_chunks_mut::<4>();
                for (group, mask) in fours.iter().zip(masks) {
                    *mask = two_of_four(group.map(size));
                }
                (values, mask) = (rest, rest_of_mask);
            }
            for (group, mask) in values.chunks(pattern.of).zip(mask.chunks_mut(pattern.of)) {
                for (i, &x) in group.iter().enumerate() {
                    // Everything before i that is as large goes first, everything after it only if larger.
                    let before = group[..i].iter().filter(|&&y| size(y) >= size(x)).count();
                    let after = group[i + 1..].iter().filter(|&&y| size(y) > size(x)).count();
                    mask[i] = (before + after < pattern.keep) as u8;
                }
            }
        },
    );
}

/// Which two of four sizes survive, without a branch: masks of a whole model are made before the first step.
#[inline(always)]
fn two_of_four([a, b, c, d]: [f32; 4]) -> [u8; 4] {
    let count = |wins: [bool; 3]| u8::from(wins.into_iter().map(u8::from).sum::<u8>() < 2);
    [
        count([b > a, c > a, d > a]),
        count([a >= b, c > b, d > b]),
        count([a >= c, b >= c, d > c]),
        count([a >= d, b >= d, c >= d]),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mask(values: &[f32], row_len: usize, pattern: &str) -> Vec<u8> {
        let mut mask = vec![9; values.len()];
        mask_rows(values, row_len, pattern.parse().unwrap(), &mut mask);
        mask
    }

    #[test]
    fn text_and_pattern_are_the_same() {
        for text in ["2:4", "1:4", "2:16", "255:256"] {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
        let json = serde_json::to_string(&Pattern::TWO_FOUR).unwrap();
        assert_eq!(json, "\"2:4\"");
        assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), Pattern::TWO_FOUR);
    }

    #[test]
    fn what_is_no_pattern_is_refused_with_the_rule() {
        for text in ["", "2", "2:", ":4", "a:b", "-1:4", "2:4:8"] {
            assert_eq!(
                text.parse::<Pattern>().unwrap_err().to_string(),
                format!(
                    "`{text}` is no pattern: write keep:of with 0 < keep < of and `of` a power of two up to 256, for example 2:4"
                )
            );
        }
        for text in ["0:4", "4:4", "5:4", "2:6", "2:512"] {
            let message = text.parse::<Pattern>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("no pattern `{text}`: write keep:of")), "{message}");
            assert!(serde_json::from_str::<Pattern>(&format!("\"{text}\"")).is_err());
        }
    }

    #[test]
    fn ties_nan_and_short_groups() {
        assert_eq!(mask(&[1.0, -1.0, 1.0, 1.0], 4, "2:4"), [1, 1, 0, 0]);
        assert_eq!(mask(&[0.0, -0.0, 0.0, 0.0], 4, "2:4"), [1, 1, 0, 0]);
        assert_eq!(mask(&[f32::NAN, 0.0, f32::NAN, f32::NEG_INFINITY], 4, "2:4"), [0, 1, 0, 1]);
        assert_eq!(mask(&[f32::NAN; 4], 4, "2:4"), [1, 1, 0, 0]);
        // Rows of 5: the groups 4 + 1 start anew in every row.
        assert_eq!(
            mask(&[1.0, 2.0, 3.0, 4.0, 0.1, 4.0, 3.0, 2.0, 1.0, 0.2], 5, "2:4"),
            [0, 0, 1, 1, 1, 1, 1, 0, 0, 1]
        );
        assert_eq!(mask(&[1.0, 2.0, 3.0], 3, "2:4"), [0, 1, 1]);
    }

    proptest! {
        /// Of all ways to keep that many, none keeps more magnitude, and of equally good ones ours is the
        /// first in the order of indices.
        #[test]
        fn no_other_choice_keeps_more(
            rows in 1usize..4,
            row_len in 1usize..20,
            (keep, of) in prop::sample::select(vec![(2usize, 4usize), (1, 4), (3, 8), (1, 2), (2, 8)]),
            seed in prop::collection::vec(-3i8..=3, 80),
        ) {
            // Few different values, so that ties are common; sums of small integers are exact.
            let values: Vec<f32> = seed[..rows * row_len].iter().map(|&x| x as f32).collect();
            let mut found = vec![9; values.len()];
            mask_rows(&values, row_len, Pattern::new(keep, of).unwrap(), &mut found);
            for (values, found) in values.chunks(row_len).zip(found.chunks(row_len)) {
                for (group, found) in values.chunks(of).zip(found.chunks(of)) {
                    let survivors = keep.min(group.len());
                    let kept = |choice: u32| (0..group.len()).filter(move |i| choice >> i & 1 == 1);
                    let sum = |choice: u32| kept(choice).map(|i| group[i].abs() as i64).sum::<i64>();
                    let best = (0..1u32 << group.len())
                        .filter(|choice| choice.count_ones() as usize == survivors)
                        .max_by(|&a, &b| sum(a).cmp(&sum(b)).then_with(|| kept(b).cmp(kept(a))))
                        .unwrap();
                    let best: Vec<u8> = (0..group.len()).map(|i| (best >> i & 1) as u8).collect();
                    prop_assert_eq!(found, best);
                }
            }
        }
    }
}
