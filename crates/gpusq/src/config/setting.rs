//! The kinds of value a setting can have: how each is read, checked, described and written.

use std::ops::{Bound, RangeBounds};

use toml::Value;

use crate::sparsity::{CRITERIA, Pattern};

/// A value that a configuration file or a flag can set.
pub(super) trait Setting {
    /// Takes `value` over if it is of the right kind and in `range`; says whether it was.
    fn set(&mut self, value: &Value, range: Range) -> bool;
    /// The value as it is written.
    fn get(&self) -> Value;
    /// What is allowed, to complete "it must be ...".
    fn allowed(&self, range: Range) -> String;
}

/// The numbers a setting may take; settings that are not numbers ignore it.
#[derive(Clone, Copy)]
pub(super) struct Range(Bound<f64>, Bound<f64>);

impl Range {
    pub(super) const ANY: Range = Range(Bound::Unbounded, Bound::Unbounded);

    pub(super) fn new(bounds: impl RangeBounds<f64>) -> Self {
        Range(bounds.start_bound().cloned(), bounds.end_bound().cloned())
    }

    fn contains(self, x: f64) -> bool {
        x.is_finite() && (self.0, self.1).contains(&x)
    }

    fn describe(self, noun: &str) -> String {
        match (self.0, self.1) {
            (Bound::Included(min), Bound::Included(max)) => format!("{noun} from {min} to {max}"),
            (min, max) => {
                let min = match min {
                    Bound::Included(x) => Some(format!("of at least {x}")),
                    Bound::Excluded(x) => Some(format!("above {x}")),
                    Bound::Unbounded => None,
                };
                let max = match max {
                    Bound::Included(x) => Some(format!("at most {x}")),
                    Bound::Excluded(x) => Some(format!("below {x}")),
                    Bound::Unbounded => None,
                };
                let bounds: Vec<String> = min.into_iter().chain(max).collect();
                format!("{noun} {}", bounds.join(" and ")).trim_end().to_owned()
            }
        }
    }
}

impl Setting for u64 {
    fn set(&mut self, value: &Value, _: Range) -> bool {
        let number = value.as_integer().and_then(|n| u64::try_from(n).ok());
        number.map(|n| *self = n).is_some()
    }

    fn get(&self) -> Value {
        Value::Integer(*self as i64)
    }

    fn allowed(&self, _: Range) -> String {
        // TOML has no larger integers.
        format!("a whole number from 0 to {}", i64::MAX)
    }
}

impl Setting for usize {
    fn set(&mut self, value: &Value, range: Range) -> bool {
        let number = value.as_integer().filter(|&n| n >= 0 && range.contains(n as f64));
        number.map(|n| *self = n as usize).is_some()
    }

    fn get(&self) -> Value {
        Value::Integer(*self as i64)
    }

    fn allowed(&self, range: Range) -> String {
        range.describe("a whole number")
    }
}

impl Setting for f64 {
    fn set(&mut self, value: &Value, range: Range) -> bool {
        let number = value.as_float().or(value.as_integer().map(|n| n as f64));
        number.filter(|&x| range.contains(x)).map(|x| *self = x).is_some()
    }

    fn get(&self) -> Value {
        Value::Float(*self)
    }

    fn allowed(&self, range: Range) -> String {
        range.describe("a number")
    }
}

impl Setting for bool {
    fn set(&mut self, value: &Value, _: Range) -> bool {
        value.as_bool().map(|b| *self = b).is_some()
    }

    fn get(&self) -> Value {
        Value::Boolean(*self)
    }

    fn allowed(&self, _: Range) -> String {
        "true or false".into()
    }
}

/// A setting that can be left open: `"none"`.
impl<T: Setting + Default> Setting for Option<T> {
    fn set(&mut self, value: &Value, range: Range) -> bool {
        if value.as_str() == Some("none") {
            *self = None;
            return true;
        }
        let mut inner = T::default();
        let good = inner.set(value, range);
        if good {
            *self = Some(inner);
        }
        good
    }

    fn get(&self) -> Value {
        self.as_ref().map_or(Value::String("none".into()), T::get)
    }

    fn allowed(&self, range: Range) -> String {
        format!("\"none\" or {}", T::default().allowed(range))
    }
}

/// The attention's pattern: any, or none.
impl Setting for Option<Pattern> {
    fn set(&mut self, value: &Value, _: Range) -> bool {
        let Some(text) = value.as_str() else { return false };
        if text == "none" {
            *self = None;
            return true;
        }
        text.parse().map(|pattern| *self = Some(pattern)).is_ok()
    }

    fn get(&self) -> Value {
        Value::String(self.map_or("none".into(), |pattern| pattern.to_string()))
    }

    fn allowed(&self, _: Range) -> String {
        "\"none\" or keep:of with 0 < keep < of and `of` a power of two up to 256, for example \"2:4\"".into()
    }
}

/// The name of a line of [`CRITERIA`].
impl Setting for &'static str {
    fn set(&mut self, value: &Value, _: Range) -> bool {
        let entry = CRITERIA.iter().find(|entry| value.as_str() == Some(entry.name));
        entry.map(|entry| *self = entry.name).is_some()
    }

    fn get(&self) -> Value {
        Value::String((*self).to_owned())
    }

    fn allowed(&self, _: Range) -> String {
        one_of(&CRITERIA.iter().map(|entry| entry.name).collect::<Vec<_>>())
    }
}

/// `"a", "b" or "c"`.
pub(super) fn one_of(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.join(""),
    }
}

/// A setting with a fixed choice of names: the enum, its names, and how it is read.
macro_rules! choice {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)+
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[$name] = &[$($name::$variant),+];

            /// The name in a configuration.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $text,)+
                }
            }

            fn named(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|choice| choice.name() == text)
            }
        }

        impl $crate::config::setting::Setting for $name {
            fn set(&mut self, value: &toml::Value, _: $crate::config::setting::Range) -> bool {
                value.as_str().and_then(Self::named).map(|choice| *self = choice).is_some()
            }

            fn get(&self) -> toml::Value {
                toml::Value::String(self.name().to_owned())
            }

            fn allowed(&self, _: $crate::config::setting::Range) -> String {
                $crate::config::setting::one_of(&[$($text),+])
            }
        }
    };
}
pub(super) use choice;
