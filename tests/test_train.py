"""The compiled loop: counts, determinism, resuming, seeds, and that it is traced once."""

import dataclasses
import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import PointGoal
from experiments import train as host
from experiments.presets import RunConfig
from experiments.run import Setup, setup
from experiments.stop import Stop
from jmql import checkpoint, train
from tests import tiny

TRUE, FALSE = jnp.array(True), jnp.array(False)


@pytest.fixture(scope="module")
def built() -> Setup:
    return tiny.build()


TRACES = []


@pytest.fixture(scope="module")
def cycle(built: Setup):
    def counted(state, rounds, warmup):
        TRACES.append(rounds)
        return built.cycle(state, rounds, warmup)

    # As the host loop does: compiled ahead of time, it cannot be compiled again.
    shapes = jax.eval_shape(built.init, built.keys)
    return jax.jit(counted).lower(shapes, jnp.int32(0), TRUE).compile()


def host_values(tree):
    """Typed keys cannot be compared as arrays; their data can."""
    return jax.device_get(checkpoint._plain(tree))


def test_warmup_fills_replay_and_learns_nothing(built, cycle):
    begin = jax.jit(built.init)(built.keys)
    state, metrics, _ = cycle(begin, jnp.int32(2), TRUE)
    chex.assert_trees_all_equal(state.agent, begin.agent)
    assert state.env_steps[0] == 80
    assert metrics["updates"][0] == 0
    assert state.memory.size[0] == 20
    action = np.asarray(state.memory.data.action[0, :, :20])
    assert np.abs(action).max() <= 1
    assert abs(action.std() - 1 / np.sqrt(3)) < 0.05  # uniform on [-1, 1]


def test_rounds_are_counted(built, cycle):
    state, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
    state, metrics, per_task = cycle(state, jnp.int32(3), FALSE)
    assert metrics["env_steps"][0] == (2 + 3) * 4 * 10
    assert metrics["updates"][0] == 3 * 6
    assert state.memory.size[0] == 50
    assert per_task["return_post"].shape == (1, 3)
    assert all(np.isfinite(value).all() for value in metrics.values())


def test_collected_return_is_the_mean_of_finished_episodes(built, cycle):
    state, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
    # Rows stand at step 20 of warm-up, where their episodes ended; 40 steps make two more each.
    state, metrics, _ = cycle(state, jnp.int32(4), FALSE)
    rewards = np.asarray(state.memory.data.reward[0, :, 20:60]).reshape(4, 2, 20)
    np.testing.assert_allclose(metrics["collect/return"][0], rewards.sum(-1).mean(), rtol=1e-5)


def test_the_cycle_is_traced_once(built, cycle):
    state = jax.jit(built.init)(built.keys)
    for rounds, warmup in ((2, TRUE), (1, FALSE), (3, FALSE)):
        state, _, _ = cycle(state, jnp.int32(rounds), warmup)
    assert len(TRACES) == 1  # over all tests of this file


def test_same_key_same_bits_and_other_key_other_bits(built, cycle):
    one, again = (cycle(jax.jit(built.init)(built.keys), jnp.int32(1), FALSE) for _ in range(2))
    chex.assert_trees_all_equal(host_values(one), host_values(again))
    other = cycle(jax.jit(built.init)(jax.random.split(built.keys[0], 1)), jnp.int32(1), FALSE)
    assert not np.allclose(one[1]["eval/return_pre"], other[1]["eval/return_pre"])


def test_restored_run_continues_bit_for_bit(built, cycle, tmp_path: Path):
    state, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
    state, _, _ = cycle(state, jnp.int32(2), FALSE)
    with checkpoint.Checkpoints(tmp_path, {}) as files:
        files.save(1, state)
        files.wait()
        restored = files.restore(jax.eval_shape(built.init, built.keys)).state
    straight = cycle(state, jnp.int32(2), FALSE)
    resumed = cycle(restored, jnp.int32(2), FALSE)
    chex.assert_trees_all_equal(host_values(straight), host_values(resumed))


def test_evaluation_leaves_training_alone(built, cycle):
    """However often it falls: a run cut into other cycles learns the same."""
    begin, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
    once, _, _ = cycle(begin, jnp.int32(4), FALSE)
    twice, first, _ = cycle(begin, jnp.int32(2), FALSE)
    twice, second, _ = cycle(twice, jnp.int32(2), FALSE)
    chex.assert_trees_all_equal(host_values(once), host_values(twice))
    assert not np.allclose(first["eval/return_pre"], second["eval/return_pre"])


def test_weights_that_are_not_finite_have_no_return(built, cycle):
    """Although an episode of such actions ends at once, which may look good."""
    state, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
    broken = jax.tree.map(lambda x: x * jnp.inf, state.agent.params["actor"])
    agent = state.agent.replace(params=state.agent.params | {"actor": broken})
    _, metrics, _ = cycle(state.replace(agent=agent), jnp.int32(0), FALSE)
    for stage in ("pre", "step1", "post"):
        assert np.isnan(metrics[f"eval/return_{stage}"]).all()


class Fragile(PointGoal):
    """Its reward is not a number beyond a quarter of the way to the goals."""

    def reward(self, before, after, action, task):
        return jnp.where(jnp.linalg.norm(after) > 0.25, jnp.nan, super().reward(0, after, 0, task))


def test_physics_that_blows_up_is_counted_and_never_reaches_replay(built):
    fragile = dataclasses.replace(built, env=Fragile(episode_length=20))
    begin = jax.jit(fragile.init)(fragile.keys)
    state, metrics, per_task = jax.jit(fragile.cycle)(begin, jnp.int32(2), TRUE)
    data = state.memory.data
    assert metrics["collect/blew_up"][0] == data.terminated.sum() > 0
    assert metrics["eval/blew_up"][0] == per_task["blew_up"].sum() > 0
    # Three agents play two episodes of each of the three tasks.
    assert metrics["eval/blew_up"][0] <= 3 * 2 * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(data))


def test_seed_of_many_equals_a_lone_run(cycle):
    def run(config: RunConfig, cycle):
        built = tiny.build(config)
        state, _, _ = cycle(jax.jit(built.init)(built.keys), jnp.int32(2), TRUE)
        return host_values(cycle(state, jnp.int32(2), FALSE))

    lone = run(dataclasses.replace(tiny.CONFIG, seed=4), cycle)
    three = dataclasses.replace(tiny.CONFIG, seed=3, seeds=3)
    many = run(three, jax.jit(tiny.build(three).cycle))
    second = jax.tree.map(lambda x: x[1:2], many)
    # The order of sums differs. What is learned first is close; adaptation is less so.
    chex.assert_trees_all_close(second[0], lone[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(second[1:], lone[1:], rtol=2e-3, atol=1e-4)
    first = jax.tree.map(lambda x: x[:1], many)
    assert not np.allclose(first[1]["eval/return_pre"], lone[1]["eval/return_pre"])


def test_rows_take_the_training_tasks_in_turn():
    config = tiny.changed(collect={"rows": 8})
    built = tiny.build(config)
    state = jax.eval_shape(built.init, built.keys)
    assert state.memory.data.reward.shape == (1, 8, 50)
    goals = jax.jit(built.init)(built.keys).actors.env_state.task["goal"][0]
    np.testing.assert_array_equal(goals[:4], built.train_tasks["goal"])
    np.testing.assert_array_equal(goals[4:], built.train_tasks["goal"])


def test_held_out_tasks_are_not_training_tasks(built):
    train_goals, held_out = built.train_tasks["goal"], built.held_out["goal"]
    distance = jnp.linalg.norm(train_goals[:, None] - held_out[None], axis=-1)
    assert distance.min() > 1e-4


def test_splits_and_ranges_set_what_tasks_are_drawn_from():
    """Goals stand at an angle on a half circle: 0 to pi, `ood` cuts it at 3/4 pi."""

    def angles(**tasks):
        split = tasks.pop("split", "iid")
        config = tiny.changed(
            tasks={"train": 64, "held_out": 50} | tasks,
            collect={"rows": 64, "replay_capacity": 6400},
        )
        built = setup(dataclasses.replace(config, split=split))
        goals = (built.train_tasks["goal"], built.held_out["goal"])
        return [np.arctan2(goal[:, 1], goal[:, 0]) / np.pi for goal in goals]

    for drawn in angles():
        assert drawn.min() < 0.1
        assert drawn.max() > 0.9
    train, held_out = angles(split="ood")
    assert 0.65 < train.max() < 0.75
    assert 0.75 < held_out.min() < 0.8
    train, held_out = angles(split="ood", train_ranges=(("angle", 0.0, 0.3),))
    assert 0.2 / np.pi < train.max() < 0.3 / np.pi
    assert held_out.min() > 0.75
    train, held_out = angles(held_out_ranges=(("angle", 1.0, 2.0),))
    assert train.max() > 0.9
    assert 1.0 / np.pi < held_out.min() < held_out.max() < 2.0 / np.pi


def test_task_seed_draws_other_tasks(built):
    other = tiny.build(tiny.changed(tasks={"seed": 1}))
    assert not np.allclose(other.train_tasks["goal"], built.train_tasks["goal"])
    assert not np.allclose(other.held_out["goal"], built.held_out["goal"])


def test_host_fetches_once_a_cycle(built, cycle, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or device_get(x))

    class Rows:
        cycles = 0

        def log(self, rows):
            Rows.cycles += 1

    saved = []
    state = jax.jit(built.init)(built.keys)
    with Stop("") as stop:
        steps = host.loop(
            built, cycle, state, Rows(), lambda state, *when: saved.append(when), stop, 0.0
        )
    # 240 steps are 6 rounds: 2 of warm-up, then two cycles of 2.
    assert len(fetched) == Rows.cycles == 3
    assert saved == [(80, True), (160, False), (240, True)]
    assert steps == 240


COLLECT = {
    "rows": 8,
    "unroll": 20,
    "exploration_noise": 0.1,
    "warmup_episode_length": 7,
    "replay_capacity": 80,
}


def trained(config: RunConfig):
    """Weights after one round of warm-up and two of learning."""
    built = tiny.build(config)
    fields = (config, built.env, built.networks)

    @jax.jit
    def rounds(key):
        state = train.init(*fields, built.train_tasks, key)
        warmup = jnp.array([True, False, False])
        return jax.lax.scan(functools.partial(train.round, *fields), state, warmup)[0]

    return jax.tree.leaves(rounds(built.keys[0]).agent.params)


@pytest.fixture(scope="module")
def unchanged():
    return trained(tiny.CONFIG)


@pytest.mark.parametrize("name", COLLECT)
def test_every_collect_setting_changes_the_result(name, unchanged):
    # `warmup_steps` is a number of rounds, see test_host_fetches_once_a_cycle.
    after = trained(tiny.changed(collect={name: COLLECT[name]}))
    assert any(not np.array_equal(x, y) for x, y in zip(unchanged, after, strict=True))
