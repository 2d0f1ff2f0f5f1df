//! The symmetric INT8 grid that weights and activations share.

/// Largest code. The grid is symmetric, so -128 is no code.
pub const MAX_CODE: f32 = 127.0;

/// The INT8 code of `x` at step size `scale`: `clamp(round(x / scale), -127, 127)`, ties to the even code,
/// no zero point. The division is a true f32 division, since multiplying by a reciprocal would give other
/// codes near ties. A NaN gives 0.
pub fn code(x: f32, scale: f32) -> i8 {
    (x / scale).round_ties_even().clamp(-MAX_CODE, MAX_CODE) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_even_code() {
        for (x, expected) in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (126.5, 126)] {
            assert_eq!(code(x, 1.0), expected, "{x}");
        }
    }

    #[test]
    fn codes_saturate_symmetrically() {
        assert_eq!(code(1e30, 0.1), 127);
        assert_eq!(code(-1e30, 0.1), -127);
        assert_eq!(code(f32::INFINITY, 1.0), 127);
        assert_eq!(code(-127.6, 1.0), -127);
        assert_eq!(code(f32::NAN, 1.0), 0);
    }

    #[test]
    fn division_is_not_by_a_reciprocal() {
        // The two differ only near ties, so the inputs lie near ties.
        let mut differing = 0;
        for i in 1..2000u16 {
            let (x, scale) = (f32::from(i) * 0.05, 0.1f32 + f32::from(i % 7) * 0.03);
            let exact = (x / scale).round_ties_even().clamp(-127.0, 127.0);
            let approximate = (x * (1.0 / scale)).round_ties_even().clamp(-127.0, 127.0);
            differing += usize::from(exact != approximate);
            assert_eq!(f32::from(code(x, scale)), exact);
        }
        assert!(differing > 0, "the inputs no longer tell the two apart");
    }
}
