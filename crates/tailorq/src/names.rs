//! Closed lists of names, as recipes and command lines write them.

/// An enum whose variants have names: `name()`, `ALL`, parsing with an error that lists the names, and the same names in
/// files.
macro_rules! by_name {
    ($(#[$about:meta])* $kind:ident, $what:literal { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $kind {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl $kind {
            /// All of them.
            pub const ALL: &'static [$kind] = &[$($kind::$variant,)*];

            /// As in recipes and on the command line.
            pub fn name(self) -> &'static str {
                match self {
                    $($kind::$variant => $name,)*
                }
            }
        }

        impl std::str::FromStr for $kind {
            type Err = String;

            fn from_str(s: &str) -> Result<Self, String> {
                let found = $kind::ALL.iter().copied().find(|k| k.name() == s);
                let names = || $kind::ALL.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ");
                found.ok_or_else(|| format!("there is no {} '{s}': use one of {}", $what, names()))
            }
        }
    };
}

pub(crate) use by_name;
