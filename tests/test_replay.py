"""Every stored step tells its row and time, so a batch tells where all of it came from."""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmql import replay
from jmql.types import Transition

# (E, C, T, H). Few, for each one compiles: no slack at all, T = C, T = 1, H near C, H = 1.
SHAPES = [(2, 6, 2, 3), (1, 4, 4, 3), (3, 5, 1, 2), (2, 9, 3, 7), (2, 8, 4, 1)]
DRAWS = 512  # so many that none of at most 16 slots is missed (chance below 1e-12)

lengths = st.lists(st.integers(1, 10), min_size=1, max_size=6)


def make_rows(rows, steps, lengths):
    """Returns transitions [E, steps] and, in plain lists, the time each step's episode began.

    Row r plays episodes of the given lengths in turn, beginning with the r-th.
    """
    began = []
    for row in range(rows):
        starts, time, episode = [], 0, row
        while time < steps:
            length = lengths[episode % len(lengths)]
            starts += [time] * length
            time, episode = time + length, episode + 1
        began.append(starts[:steps])
    row, time = np.meshgrid(np.arange(rows), np.arange(steps), indexing="ij")
    end = np.diff(np.array(began), axis=1, append=0) > 0
    transitions = Transition(
        observation=np.stack([row, time], axis=-1).astype(np.float32),
        action=np.stack([-row, -time, row + time], axis=-1).astype(np.float32),
        reward=(100.0 * row + time).astype(np.float32),
        terminated=end & (time % 2 == 0),
        truncated=end & (time % 2 == 1),
        next_observation=np.stack([row, time + 0.5], axis=-1).astype(np.float32),
        step=(time - np.array(began)).astype(np.int32),
    )
    return transitions, began


def take(transitions, steps):
    """Returns some steps of every row."""
    return jax.tree.map(lambda x: x[:, steps], transitions)


def fill(slots, unroll, transitions, writes):
    """Returns a replay after `writes` writes of T steps."""
    example = jax.tree.map(lambda x: x[0, 0], transitions)
    state = _init(example, len(transitions.reward), slots)
    for first in range(0, writes * unroll, unroll):
        state = _add(state, take(transitions, slice(first, first + unroll)))
    return state


_init = jax.jit(replay.init, static_argnums=(1, 2))
_add = jax.jit(replay.add)
_sample = jax.jit(replay.sample, static_argnums=(2, 3))
_sample_whole = jax.jit(replay.sample_whole, static_argnums=(2, 3, 4))
_windows = jax.jit(replay.windows, static_argnums=3)


def places(batch):
    """Returns the set of (row, time) in a batch."""
    return {tuple(place) for place in np.asarray(batch.transition.observation, int).tolist()}


def window_times(newest, first, history_length):
    """The oracle: the times that a window ending at `newest` shows, None before the `first`."""
    times = range(newest - history_length + 1, newest + 1)
    return [time if time >= first else None for time in times]


def assert_windows(batch, transitions, began, history_length):
    """The whole batch against the recorded past."""
    batch, past = jax.tree.map(np.asarray, (batch, transitions))
    row, time = batch.transition.observation.astype(int).T
    chex.assert_trees_all_equal(batch.transition, jax.tree.map(lambda x: x[row, time], past))
    for window, shift in ((batch.history, 1), (batch.next_history, 0)):
        times = [
            window_times(t - shift, began[r][t], history_length)
            for r, t in zip(row.tolist(), time.tolist(), strict=True)
        ]
        mask = np.array([[t is not None for t in window] for window in times])
        source = np.array([[0 if t is None else t for t in window] for window in times])
        np.testing.assert_array_equal(window.mask, mask)
        for name in ("observation", "action", "reward"):
            expected = getattr(past, name)[row[:, None], source]
            np.testing.assert_array_equal(getattr(window, name)[mask], expected[mask])


@given(st.sampled_from(SHAPES), st.integers(1, 12), lengths, st.integers(0, 2**31 - 1))
def test_sample_is_the_stored_past(shape, writes, lengths, seed):
    rows, slots, unroll, history_length = shape
    transitions, began = make_rows(rows, writes * unroll, lengths)
    state = fill(slots, unroll, transitions, writes)
    tasks = 10 * np.arange(rows)[:, None]
    batch = _sample(state, jax.random.key(seed), DRAWS, history_length, tasks)
    np.testing.assert_array_equal(batch.task[:, 0], 10 * batch.transition.observation[:, 0])

    # A full ring has lost what came before its oldest step: the H oldest are history only.
    steps = writes * unroll
    oldest = 0 if steps < slots else steps - slots + history_length
    assert places(batch) == {(r, t) for r in range(rows) for t in range(oldest, steps)}
    assert_windows(batch, transitions, began, history_length)
    np.testing.assert_array_equal(batch.weight, np.ones(DRAWS))


@given(
    st.sampled_from(SHAPES[:2]), st.integers(1, 7), st.integers(1, 20), st.integers(0, 2**31 - 1)
)
def test_recent_draws_the_last_steps_of_each_row(shape, writes, recent, seed):
    rows, slots, unroll, history_length = shape
    steps = writes * unroll
    transitions, began = make_rows(rows, steps, [3, 1, 5])
    state = fill(slots, unroll, transitions, writes)
    batch = _sample_whole(state, jax.random.key(seed), DRAWS, history_length, recent)

    oldest = max(0 if steps < slots else steps - slots + history_length, steps - recent)
    assert places(batch) == {(r, t) for r in range(rows) for t in range(oldest, steps)}
    assert_windows(batch, transitions, began, history_length)


def test_every_place_is_drawn_equally_often():
    rows, slots, unroll, history_length = 2, 6, 2, 3
    transitions, _ = make_rows(rows, 10, [4])
    state = fill(slots, unroll, transitions, 5)
    num = 6000
    batch = _sample(state, jax.random.key(0), num, history_length)
    _, counts = np.unique(batch.transition.reward, return_counts=True)
    expected = num / (rows * (slots - history_length))
    assert len(counts) == 6
    np.testing.assert_allclose(counts, expected, atol=5 * expected**0.5)


def test_an_empty_history_has_no_step():
    transitions, _ = make_rows(1, 4, [1])
    batch = _sample(fill(4, 4, transitions, 1), jax.random.key(0), 8, 3)
    assert not batch.history.mask.any()
    np.testing.assert_array_equal(batch.next_history.mask, [[False, False, True]] * 8)


def test_windows_of_whole_episodes():
    episodes, length, history_length = 3, 5, 4
    transitions, began = make_rows(episodes, length, [length])
    row, slot = np.divmod(np.arange(episodes * length), length)
    batch = _windows(transitions, row, slot, history_length)
    np.testing.assert_array_equal(batch.transition.observation, np.stack([row, slot], axis=-1))
    assert_windows(batch, transitions, began, history_length)


def test_history_may_be_longer_than_an_episode():
    transitions, began = make_rows(2, 3, [3])
    batch = _windows(transitions, np.array([0, 1, 1]), np.array([2, 0, 2]), 8)
    assert_windows(batch, transitions, began, 8)


def test_types_are_kept():
    transitions, _ = make_rows(2, 4, [2])
    state = fill(8, 4, transitions, 1)
    chex.assert_trees_all_equal_dtypes(state.data, transitions)
    batch = _sample(state, jax.random.key(0), 5, 3)
    chex.assert_trees_all_equal_dtypes(batch.transition, transitions)


def test_a_write_that_would_wrap_is_refused():
    transitions, _ = make_rows(2, 4, [2])
    state = fill(8, 4, transitions, 0)
    with pytest.raises(AssertionError, match="divisible"):
        _add(state, take(transitions, slice(3)))


def test_rows_must_match():
    transitions, _ = make_rows(2, 4, [2])
    state = fill(8, 4, transitions, 0)
    with pytest.raises(AssertionError, match="shape"):
        _add(state, jax.tree.map(lambda x: x[:1], transitions))


def test_places_are_flat():
    transitions, _ = make_rows(2, 4, [2])
    column = np.zeros((3, 1), np.int32)
    with pytest.raises(AssertionError, match="rank"):
        _windows(transitions, column, column, 2)
