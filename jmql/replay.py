"""Replay in rows: each environment row has its own ring of transitions.

No history is stored. Windows are cut when a batch is drawn, with one gather of H + 1 slots.
Where several devices share the rows (`mesh`), each holds the rings of its own.
"""

import math

import chex
import jax
import jax.numpy as jnp
from flax import struct

from jmql import mesh
from jmql.types import Array, Batch, History, Key, Transition


class ReplayState(struct.PyTreeNode):
    """Rings of C slots. All rows are written together, so they share a write head."""

    data: Transition  # [E, C, ...]
    cursor: Array  # [] int32: the slot written next
    size: Array  # [] int32: slots filled


def init(example: Transition, rows: int, slots: int) -> ReplayState:
    """Returns an empty replay.

    Args:
        example: one transition, for shapes and types.
        rows: E.
        slots: C, a multiple of the number of steps added at a time.
    """
    data = jax.tree.map(lambda x: jnp.zeros((rows, slots, *x.shape), x.dtype), example)
    return ReplayState(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(state: ReplayState, transitions: Transition) -> ReplayState:
    """Writes the next T steps of every row, [E, T, ...], over the oldest ones.

    T must divide C, so that a write never wraps. The first step ever written to a row has to
    begin an episode.
    """
    rows, slots = state.data.reward.shape
    length = transitions.reward.shape[1]
    chex.assert_tree_shape_prefix(transitions, (rows, length))
    chex.assert_is_divisible(slots, length)
    data = jax.tree.map(
        lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, state.cursor, axis=1),
        state.data,
        transitions,
    )
    return ReplayState(
        data, (state.cursor + length) % slots, jnp.minimum(state.size + length, slots)
    )


def windows(data: Transition, row: Array, slot: Array, history_length: int) -> Batch:
    """Cuts the transitions at given places with their histories.

    Args:
        data: rings [E, C, ...] of successive steps.
        row: [B] int32.
        slot: [B] int32. The steps of the same episode must stand in the slots before it.
        history_length: H.

    Returns:
        A batch [B] with weights of one.
    """
    chex.assert_rank([row, slot], 1)
    slots = data.reward.shape[1]
    back = jnp.arange(history_length, -1, -1)[None]  # [1, H + 1], 0 is the transition itself
    places = (slot[:, None] - back) % slots  # [B, H + 1]
    transition = jax.tree.map(lambda x: x[row, slot], data)
    observation, action, reward = (
        x[row[:, None], places] for x in (data.observation, data.action, data.reward)
    )
    begun = back <= transition.step[:, None]  # [B, H + 1]
    return Batch(
        transition,
        History(observation[:, :-1], action[:, :-1], reward[:, :-1], begun[:, :-1]),
        History(observation[:, 1:], action[:, 1:], reward[:, 1:], begun[:, 1:]),
        weight=jnp.ones(row.shape),
    )


def sample(
    state: ReplayState, key: Key, num: int, history_length: int, tasks: Array | None = None
) -> Batch:
    """Draws transitions uniformly, with replacement, from rows and steps.

    Rows are stratified: of `strata(E, B)` blocks of rows, each gives the same number. Windows never
    reach over an episode's start or the write head: once the rings are full, the H oldest steps are
    history only.

    Args:
        state: a replay with at least one step.
        key: for the draw.
        num: B.
        history_length: H, below C.
        tasks: [E, P], what a batch says of the task of each row.

    Returns:
        This device's share of the batch, [B / size], from the rows that it holds.
    """
    row, slot = mesh.share(_places(state, key, num, history_length))
    row = row - mesh.index() * len(state.data.reward)
    batch = windows(state.data, row, slot, history_length)
    return batch if tasks is None else batch.replace(task=tasks[row])


def newest(state: ReplayState, length: int) -> Transition:
    """Returns the last steps of every row, [E, length, ...]; the length divides C."""
    slots = state.data.reward.shape[1]
    first = (state.cursor - length) % slots
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, length, axis=1), state.data
    )


def fragments(state: ReplayState, key: Key, num: int, length: int) -> Transition:
    """Draws what rows did in single rounds, uniformly, with replacement; rows are stratified.

    Args:
        state: a replay with at least one round.
        key: for the draw.
        num: B.
        length: T, steps of a round; divides C.

    Returns:
        This device's share of them, [B / size, T, ...], from the rows that it holds.
    """
    held, slots = state.data.reward.shape
    row_key, age_key = jax.random.split(key)
    age = jax.random.randint(age_key, (num,), 1, state.size // length + 1)  # 1 is the newest
    row, age = mesh.share((_rows(state, row_key, num), age))
    place = (state.cursor - age * length)[:, None] + jnp.arange(length)[None]
    row = (row - mesh.index() * held)[:, None]
    return jax.tree.map(lambda x: x[row, place % slots], state.data)


def sample_whole(
    state: ReplayState,
    key: Key,
    num: int,
    history_length: int,
    recent: int | None = None,
    tasks: int | None = None,
) -> Batch:
    """Draws as `sample` does, and gives every device the whole batch [B].

    Args:
        state, key, num, history_length: as in `sample`.
        recent: draws only from the last so many steps of each row; None is from all.
        tasks: draws from so many tasks in turn, where row e is of task e % tasks; divides E. None
            is from blocks of rows.
    """
    row, slot = _places(state, key, num, history_length, recent, tasks)
    held = len(state.data.reward)
    batch = windows(state.data, row % held, slot, history_length)
    if mesh.size() == 1:
        return batch
    here = row // held == mesh.index()
    return mesh.total(
        jax.tree.map(
            lambda x: jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype)),
            batch,
        )
    )


def strata(rows: int, num: int) -> int:
    """Returns how many blocks of rows give the same share of a batch: as many as can be."""
    return math.gcd(rows, num)


def _places(
    state: ReplayState,
    key: Key,
    num: int,
    history_length: int,
    recent: int | None = None,
    tasks: int | None = None,
) -> tuple[Array, Array]:
    """Draws rows [B], counted over all devices, and slots [B]."""
    slots = state.data.reward.shape[1]
    row_key, age_key = jax.random.split(key)
    row = _rows(state, row_key, num, tasks)
    available = state.size - jnp.where(state.size == slots, history_length, 0)
    if recent is not None:
        available = jnp.minimum(available, recent)
    age = jax.random.randint(age_key, (num,), 1, available + 1)  # 1 is the newest
    return row, (state.cursor - age) % slots


def _rows(state: ReplayState, key: Key, num: int, tasks: int | None = None) -> Array:
    """Draws rows [B], counted over all devices."""
    rows, place = len(state.data.reward) * mesh.size(), jnp.arange(num)
    if tasks is None:
        blocks = strata(rows, num)
        row = jax.random.randint(key, (num,), 0, rows // blocks)
        return place // (num // blocks) * (rows // blocks) + row
    chex.assert_is_divisible(rows, tasks)
    return jax.random.randint(key, (num,), 0, rows // tasks) * tasks + place % tasks
