"""Random keys by purpose: no two purposes share a key, in whatever order they are asked for."""

import zlib

import jax

from jmql.types import Key


def derive(key: Key, purpose: str) -> Key:
    """Returns the key [] of one purpose.

    `jax.random.split(key, 2)` and `jax.random.split(key, 3)` share children. So a key from which
    several things are drawn, here or elsewhere, is never split: each takes what its name gives it.
    """
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
