//! JSON objects whose keys must be unique.
//!
//! A map type of serde keeps the last of two equal keys in silence, which would hide one of two tensors.

use crate::error::printable;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

/// The entries of an object in file order; a repeated key is an error.
pub(crate) struct UniqueMap<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        unique_entries(map, |_, map| map.next_value()).map(UniqueMap)
    }
}

/// The entries of `map` in file order, each value read by `value(key, map)`; a repeated key is an error.
pub(crate) fn unique_entries<'de, A: MapAccess<'de>, V>(
    mut map: A,
    mut value: impl FnMut(&str, &mut A) -> Result<V, A::Error>,
) -> Result<Vec<(String, V)>, A::Error> {
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    while let Some(key) = map.next_key::<String>()? {
        if !seen.insert(key.clone()) {
            return Err(A::Error::custom(format!("the name '{}' occurs twice", printable(&key))));
        }
        let value = value(&key, &mut map)?;
        entries.push((key, value));
    }
    Ok(entries)
}
