"""Random keys by purpose: no two purposes share a key, in whatever order they are asked for."""

import zlib
from typing import Any

import jax

from jmql.types import Key


def derive(key: Key, purpose: str) -> Key:
    """Returns the key [] of one purpose.

    `jax.random.split(key, 2)` and `jax.random.split(key, 3)` share children. So a key from which
    several things are drawn, here or elsewhere, is never split: each takes what its name gives it.
    """
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def is_key(leaf: Any) -> bool:
    """Returns whether an array, or a shape, is of typed keys."""
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def plain(leaf: Any) -> Any:
    """Returns an array that any library understands: typed keys as their data."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf
