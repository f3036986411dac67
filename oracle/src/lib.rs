//! Test oracles that are too heavy for the workspace's ordinary build; see `tests/`. The library itself is empty.
