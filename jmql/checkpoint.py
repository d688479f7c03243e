"""The whole TrainState on disk, with orbax. The only file of this package that touches a disk."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(tree: Any) -> Any:
    """Returns the tree with typed keys as their data."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def save(folder: Path, step: int, state: Any) -> None:
    """Writes a pytree of arrays as checkpoint `step` and waits until it is complete."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        manager.save(step, args=ocp.args.StandardSave(_plain(state)))
        manager.wait_until_finished()


def restore(folder: Path, like: Any) -> Any:
    """Reads the newest checkpoint.

    Args:
        folder: as given to `save`.
        like: the pytree that was saved, or its shapes (`jax.eval_shape`).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint has other shapes.
    """
    shapes = jax.eval_shape(_plain, like)
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
        plain = manager.restore(step, args=ocp.args.StandardRestore(shapes))
    return jax.tree.map(
        lambda leaf, x: jax.random.wrap_key_data(x) if _is_key(leaf) else x, like, plain
    )
