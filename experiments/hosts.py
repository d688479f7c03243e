"""Several hosts that run the same command, each with its own devices: what they do as one.

Only the first writes and prints. All else is the same everywhere, so that every host compiles and
runs the same program; what the disk or a clock decides, the first tells the others.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from experiments.config import RunFailed
from jmql.keys import is_key, plain
from jmql.settings import ConfigError

# What says which host this is, where no cloud does: JAX itself reads the first.
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins the other hosts, before JAX starts. On Cloud TPU they find each other.

    Raises:
        ConfigError: it is not said, or not known, which they are.
    """
    address, number, index = map(os.environ.get, _VARIABLES)
    # A signal is ours to answer, see `experiments.stop`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            None if number is None else int(number),
            None if index is None else int(index),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"distributed is set, and the hosts are not known: {str(error).partition(chr(10))[0]};"
            f" valid: on Cloud TPU, or with {', '.join(_VARIABLES)} set"
        ) from None


def count() -> int:
    """Returns how many hosts there are."""
    return jax.process_count()


def is_first() -> bool:
    """Returns whether this host writes and prints."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Returns whether any host says so; the same on all of them, who must all ask."""
    if count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.array(flag))).any())


def told(tree: Any, shapes: Any) -> Any:
    """Returns what the first host has, in the memory of each.

    Args:
        tree: of arrays and typed keys; what it is elsewhere does not matter.
        shapes: what it looks like (`jax.eval_shape`).
    """
    if count() == 1:
        return tree
    like = jax.eval_shape(lambda tree: jax.tree.map(plain, tree), shapes)
    if is_first():
        ours = jax.tree.map(plain, tree)
    else:
        ours = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    got = multihost_utils.broadcast_one_to_all(ours)
    return jax.tree.map(
        lambda leaf, new: jax.random.wrap_key_data(jnp.asarray(new)) if is_key(leaf) else new,
        shapes,
        got,
    )


def gathered(tree: Any) -> Any:
    """Returns arrays of all hosts' devices in the memory of each host, keys as their data."""
    if count() == 1:
        return tree
    return multihost_utils.process_allgather(jax.tree.map(plain, tree), tiled=True)


def placed(tree: Any, shardings: Any) -> Any:
    """Returns arrays that every host has as arrays on all hosts' devices.

    Args:
        tree: of arrays and typed keys.
        shardings: a tree of `Sharding`, of which `tree` may have more levels.
    """

    def place(leaf: Any, where: Any) -> Any:
        array = np.asarray(plain(leaf))
        there = jax.make_array_from_callback(array.shape, where, lambda part: array[part])
        return jax.random.wrap_key_data(there) if is_key(leaf) else there

    return jax.tree.map(
        lambda where, part: jax.tree.map(lambda leaf: place(leaf, where), part), shardings, tree
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Computes on all hosts.

    Raises:
        RunFailed: one of them does not answer.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if count() == 1 or (isinstance(error, ValueError) and "Gloo" not in str(error)):
            raise
        raise RunFailed(
            f"another host has failed or gone ({str(error).strip().partition(chr(10))[0]}); the"
            " same command on all of them goes on from the last save"
        ) from error


def local(array: Any) -> Any:
    """Returns the first element of an array [S] that is the same for all seeds, of this host's."""
    return np.asarray(array.addressable_shards[0].data).flat[0]
