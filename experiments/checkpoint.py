"""The whole TrainState on disk, with orbax."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments import hosts
from jmql.keys import is_key, plain

# Raised with every change of what a checkpoint holds.
FORMAT = 4
_KEEP = 3  # the newest, and two to fall back to
_FIRST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


class Mismatch(ValueError):
    """A checkpoint of another run; the message names what differs."""


class Unreadable(Exception):
    """Every checkpoint is damaged; the message says how."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    state: Any
    step: int
    damaged: dict[int, str]  # newer checkpoints that could not be read, and why


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Leaving the context waits for the last save; what went wrong with it only `wait` raises.

    Args:
        folder: where they are, made if need be.
        identity: settings by name that a state cannot be restored under other values of.
        defaults: values of the settings that a checkpoint does not name: it is older than they.
        read_only: leave everything as it is, for another process may be writing.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        read_only: bool = False,
    ):
        # As read back from JSON, where a tuple is a list.
        self._identity = json.loads(json.dumps({"format": FORMAT} | identity))
        self._defaults = json.loads(json.dumps(defaults or {}))
        self._folder, self._read_only = folder.absolute(), read_only
        # Else orbax waits for the other hosts, who have nothing to write.
        alone = {} if hosts.count() == 1 else {"multiprocessing_options": _FIRST}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else _KEEP,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=False,
                **alone,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(**alone),
                "identity": ocp.JsonCheckpointHandler(**alone),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._manager.close()
        for half_written in self._folder.glob("*.orbax-checkpoint-tmp*"):
            if not self._read_only:
                shutil.rmtree(half_written, ignore_errors=True)

    def save(self, step: int, state: Any) -> None:
        """Begins to write a pytree of arrays, after the one before is complete.

        The state may be donated as soon as this returns: until it is written there is one more
        copy of it in host memory.

        Raises:
            OSError, ValueError: this or the save before failed; older checkpoints are untouched.
            RuntimeError: there is a checkpoint of this step or a later one.
        """
        self.wait()
        state = _plain(state)
        if jax.default_backend() == "cpu" and hosts.count() == 1:
            # There orbax reads the arrays' own memory, and whoever is given it waits for that.
            state = jax.tree.map(jnp.copy, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self._identity)
        )
        if not self._manager.save(step, args=args):
            raise RuntimeError(f"step {step} is not past the newest checkpoint, {self.newest()}")

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint that is complete, once the last save is."""
        with contextlib.suppress(Exception):
            self.wait()
        return self._manager.latest_step()

    def steps(self, up_to: float = math.inf) -> list[int]:
        """Returns the steps of the checkpoints that are complete, but for those past `up_to`."""
        return [step for step in self._manager.all_steps() if step <= up_to]

    def saving(self) -> bool:
        """Returns whether a save has not ended yet."""
        return bool(self._manager.is_saving_in_progress())

    def check(self) -> None:
        """Raises what went wrong with a save that has ended; does not wait for one that has not."""
        if not self.saving():
            self.wait()

    def drop(self, steps: Iterable[int]) -> None:
        """Deletes checkpoints, such as damaged ones: nothing older than the newest can be saved."""
        for step in steps:
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            OSError, ValueError: it failed.
        """
        self._manager.wait_until_finished()

    def restore(self, like: Any, up_to: float = math.inf) -> Restored:
        """Reads the newest checkpoint that is whole.

        Args:
            like: the pytree that was saved, or its shapes (`jax.eval_shape`).
            up_to: the step of the newest that counts.

        Raises:
            FileNotFoundError: there is no checkpoint.
            Mismatch: the newest readable one is of another configuration, shape or version.
            Unreadable: none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.steps(up_to), reverse=True):
            try:
                state = self._read(step, like)
            except Mismatch:
                raise
            except Exception as error:  # whatever a torn file makes orbax raise
                damaged[step] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            else:
                return Restored(state, step, damaged)
        if damaged:
            raise Unreadable("; ".join(f"step {step}: {why}" for step, why in damaged.items()))
        raise FileNotFoundError("no checkpoint")

    def _read(self, step: int, like: Any) -> Any:
        identity = self._manager.restore(
            step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())
        )["identity"]
        _same(self._identity, self._defaults | identity)
        shapes = jax.tree.map(_asked, like)
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise ValueError("the description of the state is missing")
        _same(_shapes(shapes), _shapes(saved))
        stored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        )["state"]
        return _whole(like, stored)


def _plain(tree: Any) -> Any:
    """Returns what orbax can write: typed keys as their data, and no arrays without elements."""
    return jax.tree.map(lambda leaf: plain(leaf) if leaf.size else None, tree)


def _asked(leaf: Any) -> Any:
    """Returns what orbax is asked for: on the devices that are here, wherever it was saved, or in
    the memory of a host that tells the others.
    """
    asked = jax.eval_shape(_plain, leaf)
    if asked is not None and hosts.count() > 1:
        return np.empty(asked.shape, asked.dtype)
    here = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if asked is None:
        return None
    return jax.ShapeDtypeStruct(asked.shape, asked.dtype, sharding=here)


def _whole(like: Any, stored: Any) -> Any:
    """Returns the tree of which `stored` was made, whose shapes are those of `like`."""
    leaves = iter(jax.tree.leaves(stored))

    def whole(leaf: Any) -> Any:
        if not leaf.size:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jax.random.wrap_key_data(next(leaves)) if is_key(leaf) else next(leaves)

    return jax.tree.map(whole, like)


def _shapes(tree: Any) -> dict[str, str]:
    """Returns shape and type of every leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for path, x in leaves
    }


def _same(here: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in here | saved:
        if here.get(name) != saved.get(name):
            raise Mismatch(f"{name} is {saved.get(name)} there and {here.get(name)} here")
