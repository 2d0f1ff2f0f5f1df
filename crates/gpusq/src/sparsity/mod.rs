//! Structured sparsity.
/// keep:of
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// kept
    pub keep: usize,
    /// of
    pub of: usize,
}
impl Pattern {
    /// 2:4
    pub const TWO_FOUR: Pattern = Pattern { keep: 2, of: 4 };
}
impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.keep, self.of)
    }
}
impl std::str::FromStr for Pattern {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<Self> {
        let (a, b) = s.split_once(':').unwrap();
        Ok(Pattern { keep: a.parse().unwrap(), of: b.parse().unwrap() })
    }
}
/// mask
pub fn mask_rows(values: &[f32], row: usize, p: Pattern, mask: &mut [u8]) {
    for (v, m) in values.chunks(row).zip(mask.chunks_mut(row)) {
        for (v, m) in v.chunks(p.of).zip(m.chunks_mut(p.of)) {
            let mut o: Vec<usize> = (0..v.len()).collect();
            o.sort_by(|&a, &b| v[b].abs().total_cmp(&v[a].abs()).then(a.cmp(&b)));
            m.fill(0);
            for &i in o.iter().take(p.keep) {
                m[i] = 1;
            }
        }
    }
}
