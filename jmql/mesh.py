"""Several devices: what is written for one device, each runs on its share.

Under `jax.shard_map` over an axis `rows`, rows of environments and replay, batches and held-out
tasks are divided, and weights are the same everywhere. Elsewhere, and on a lone device, nothing
here communicates. Draws belong to rows and never to devices, so that any number of them computes
the same to float tolerance.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jmql.types import Array

AXIS = "rows"


def size() -> int:
    """Returns how many devices share the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def index() -> Array:
    """Returns which of these devices this one is, [] int32."""
    return jax.lax.axis_index(AXIS) if size() > 1 else jnp.int32(0)


def share(tree: Any) -> Any:
    """Returns this device's part of leaves [N, ...], [N / size, ...]; the size divides N."""
    if size() == 1:
        return tree
    return jax.tree.map(lambda x: x.reshape(size(), len(x) // size(), *x.shape[1:])[index()], tree)


def gather(tree: Any) -> Any:
    """Returns [N, ...] of the parts [N / size, ...] that the devices hold."""
    if size() == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def total(tree: Any) -> Any:
    """Returns the sums over devices, of the same types; of flags, whether any is set."""
    if size() == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.psum(x, AXIS).astype(x.dtype), tree)


def mean(tree: Any) -> Any:
    """Returns the means over devices, of numbers of one type, in one message."""
    if size() == 1:
        return tree
    flat, whole = ravel_pytree(tree)
    return whole(jax.lax.pmean(flat, AXIS))
