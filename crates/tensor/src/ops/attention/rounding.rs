//! The numbers that rounding as [`Half`](super::Half) says is made of, for the CPU and for kernels.

macro_rules! constants {
    ($($(#[$doc:meta])* $kind:ident $name:ident: $type:ty = $value:literal;)*) => {
        $($(#[$doc])* pub(crate) const $name: $type = $value;)*

        /// The same in a namespace, for the source of kernels, before what uses it.
        macro_rules! text {
            () => {
                concat!(
                    "namespace rounding {\n",
                    $("constexpr ", stringify!($kind), " ", stringify!($name), " = ", stringify!($value), ";\n",)*
                    "}\n"
                )
            };
        }
        pub(crate) use text;
    };
}

constants! {
    /// The first base is not below the scores of so many keys, and so many at a time are looked at for one that raises it.
    int TILE: usize = 64;
    /// Scores in bits become multiples of 1 / 256 when this is added: an f32 of its size has no finer fraction.
    float GRID: f32 = 49152.0;
    /// Weights are divided by this power of 2.
    float SCALE: f32 = 13.0;
    /// Weights become multiples of 2^-24 when this is added.
    float ONES: f32 = 0.75;
    /// A score so many bits above the base raises it; this many give a weight that no f16 holds.
    float ROOM: f32 = 28.0;
    /// From so many bits on a base is a score itself, as its fraction has no room beside [`GRID`].
    float LARGEST: f32 = 16384.0;
}
