"""The compiled loop: counts, determinism, resuming, seeds, and that it is traced once."""

import dataclasses
import functools
import re
import zlib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.point import PointGoal
from experiments import checkpoint
from experiments import loop as host
from experiments.config import RunConfig
from experiments.program import Program, build
from experiments.stop import Stop
from jmql import mql, train
from tests import tiny

TRUE, FALSE = jnp.array(True), jnp.array(False)


@pytest.fixture(scope="module")
def built() -> Program:
    return tiny.build()


TRACES = []


@pytest.fixture(scope="module")
def cycle(built: Program):
    def counted(state, rounds, warmup, measured):
        TRACES.append(rounds)
        return built.cycle(state, rounds, warmup, measured)

    # As the host loop does: compiled ahead of time, it cannot be compiled again.
    compiled = jax.jit(counted).lower(built.shapes, jnp.int32(0), TRUE, TRUE).compile()

    def cycle(state, rounds, warmup, measured=TRUE, numbers=None):
        return compiled(state, rounds, warmup, measured)

    return cycle


def host_values(tree):
    """Typed keys cannot be compared as arrays; their data can."""
    return jax.device_get(checkpoint._plain(tree))


def test_warmup_fills_replay_and_learns_nothing(built, cycle):
    begin = built.init(built.keys)
    state, metrics, _ = cycle(begin, jnp.int32(2), TRUE)
    still = begin.agent.replace(scale=state.agent.scale)  # which has seen the steps
    chex.assert_trees_all_equal(state.agent, still)
    assert state.agent.scale.count[0] == 2 * built.config.steps_per_round
    assert state.rounds[0] == 2
    assert metrics["updates"][0] == 0
    assert state.memory.size[0] == 20
    action = np.asarray(state.memory.data.action[0, :, :20])
    assert np.abs(action).max() <= 1
    assert abs(action.std() - 1 / np.sqrt(3)) < 0.05  # uniform on [-1, 1]


def test_rounds_are_counted(built, cycle):
    state, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
    state, metrics, per_task = cycle(state, jnp.int32(3), FALSE)
    assert metrics["rounds"][0] == 2 + 3
    assert metrics["updates"][0] == 3 * 6
    assert state.memory.size[0] == 50
    assert per_task["return_post"].shape == (1, 3)
    assert all(np.isfinite(value).all() for value in metrics.values())


def test_collected_return_is_the_mean_of_finished_episodes(built, cycle):
    state, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
    # Rows stand at step 20 of warm-up, where their episodes ended; 40 steps make two more each.
    state, metrics, _ = cycle(state, jnp.int32(4), FALSE)
    rewards = np.asarray(state.memory.data.reward[0, :, 20:60]).reshape(4, 2, 20)
    np.testing.assert_allclose(metrics["collect/return"][0], rewards.sum(-1).mean(), rtol=1e-5)


def test_the_cycle_is_traced_once(built, cycle):
    state = built.init(built.keys)
    for rounds, warmup in ((2, TRUE), (1, FALSE), (3, FALSE)):
        state, _, _ = cycle(state, jnp.int32(rounds), warmup)
    assert len(TRACES) == 1  # over all tests of this file


def test_same_key_same_bits_and_other_key_other_bits(built, cycle):
    one, again = (cycle(built.init(built.keys), jnp.int32(1), FALSE) for _ in range(2))
    chex.assert_trees_all_equal(host_values(one), host_values(again))
    other = cycle(built.init(jax.random.split(built.keys[0], 1)), jnp.int32(1), FALSE)
    assert not np.allclose(one[1]["eval/return_pre"], other[1]["eval/return_pre"])


def test_restored_run_continues_bit_for_bit(built, cycle, tmp_path: Path):
    state, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
    state, _, _ = cycle(state, jnp.int32(2), FALSE)
    with checkpoint.Checkpoints(tmp_path, {}) as files:
        files.save(1, state)
        files.wait()
        restored = files.restore(built.shapes).state
    straight = cycle(state, jnp.int32(2), FALSE)
    resumed = cycle(restored, jnp.int32(2), FALSE)
    chex.assert_trees_all_equal(host_values(straight), host_values(resumed))


def test_evaluation_leaves_training_alone(built, cycle):
    """However often it falls: a run cut into other cycles learns the same."""
    begin, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
    once, _, _ = cycle(begin, jnp.int32(4), FALSE)
    twice, first, _ = cycle(begin, jnp.int32(2), FALSE)
    twice, second, _ = cycle(twice, jnp.int32(1), FALSE, FALSE)
    assert not second["eval/return_pre"].any()  # there was none
    twice, second, _ = cycle(twice, jnp.int32(1), FALSE)
    chex.assert_trees_all_equal(host_values(once), host_values(twice))
    assert not np.allclose(first["eval/return_pre"], second["eval/return_pre"])


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_meta_trained_weights_that_are_not_finite_are_noticed(network, built, cycle):
    """By their norm, which ends the run; and an actor of them earns the worst there is."""
    state, metrics, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
    assert np.isfinite(metrics["train/weight_norm"]).all()
    broken = jax.tree.map(lambda x: x * jnp.inf, state.agent.params[network])
    agent = state.agent.replace(params=state.agent.params | {network: broken})
    _, metrics, _ = cycle(state.replace(agent=agent), jnp.int32(0), FALSE)
    assert not np.isfinite(metrics["train/weight_norm"]).any()
    if network == "actor":
        for stage in ("pre", "step1", "post"):
            assert (metrics[f"eval/return_{stage}"] == 20 * built.env.worst_reward).all()


class Fragile(PointGoal):
    """Its reward is not a number beyond a seventh of the way to the goals."""

    def reward(self, before, after, action, task):
        return jnp.where(jnp.linalg.norm(after) > 1 / 7, jnp.nan, super().reward(0, after, 0, task))


def test_physics_that_blows_up_is_counted_and_never_reaches_replay(built):
    fragile = dataclasses.replace(built, env=Fragile(episode_length=20))
    begin = fragile.init(fragile.keys)
    state, metrics, per_task = jax.jit(fragile.cycle)(begin, jnp.int32(2), TRUE, TRUE)
    data = state.memory.data
    worst = fragile.env.worst_reward
    assert metrics["collect/blew_up"][0] == (data.reward == worst).sum() > 0
    assert not data.terminated.any()
    assert metrics["eval/blew_up"][0] == per_task["blew_up"].sum() > 0
    # Three agents play two episodes of each of the three tasks.
    assert metrics["eval/blew_up"][0] <= 3 * 2 * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(data))
    # A random play that blows up is worth less than the worst sane one.
    assert metrics["collect/return"][0] < -20 * 2


def test_the_policy_delay_is_counted_over_the_life_of_a_learner():
    """12 rounds of one update with delay 2 move the actor 6 times, as do 4 rounds of three."""
    for updates, rounds in ((1, 12), (3, 4)):
        built = tiny.build(
            tiny.changed(td3={"policy_delay": 2}, train={"updates_per_round": updates})
        )

        @jax.jit
        def epoch(state, rounds, built=built):
            none = jnp.int32(0)
            return train.epoch(built.config, built.env, built.learner, state, rounds, FALSE, none)

        state, metrics = epoch(tiny.filled(built), jnp.int32(rounds))
        steps = {name: state.agent.opt_state[name][0].count for name in ("actor", "critic")}
        assert steps == {"actor": 6, "critic": 12}
        assert metrics["train/actor_loss"] != 0


def test_the_delayed_steps_stay_a_branch_for_all_seeds(built):
    """A condition that depends on the seed would be computed on both sides, at every update."""
    learner, config = built.learner, built.config

    def learn(agent, memory, tasks):
        over_seeds = jax.vmap(learner.learn, in_axes=(0, 0, 0, None, None, None))
        return over_seeds(agent, memory, tasks, jax.random.key(0), TRUE, jnp.int32(0))

    shapes = built.shapes
    jaxpr = jax.make_jaxpr(learn)(shapes.agent, shapes.memory, shapes.actors.env_state.task)
    assert config.td3.policy_delay > 1
    assert str(jaxpr).count("cond[") == 1


@pytest.mark.parametrize("name", ["changes", "task_head"])
def test_what_contexts_see_and_tell_is_learned_from(built, name):
    """And the tasks that they learn to tell are those of the rows."""
    config = tiny.changed(network={name: True})
    other = tiny.build(dataclasses.replace(config, task=built.config.task))

    def epochs(built, *rounds):
        @jax.jit
        def epoch(state, rounds):
            what = (built.config, built.env, built.learner)
            return train.epoch(*what, state, rounds, FALSE, jnp.int32(0))

        state, found = tiny.filled(built), []
        for number in rounds:
            state, metrics = epoch(state, jnp.int32(number))
            found.append(metrics)
        return found

    (plain,) = epochs(built, 2)
    first, _, last = epochs(other, 2, 200, 2)
    assert first["train/critic_loss"] != plain["train/critic_loss"]
    if name == "task_head":
        assert last["train/task_loss"] < 0.6 * first["train/task_loss"]
    else:
        assert "train/task_loss" not in last


def test_tasks_are_told_in_numbers_of_one_scale():
    tasks = {"b": jnp.array([[1, 2], [3, 2], [5, 2]]), "a": jnp.array([0.0, 30.0, 60.0])}
    expected = np.array([[-1, -1, 0], [0, 0, 0], [1, 1, 0]]) * 1.5**0.5
    np.testing.assert_allclose(mql.described(tasks), expected, atol=1e-5)


def test_no_two_purposes_share_a_key():
    """With the default seeds: goals are not drawn from the keys that starts are drawn from."""
    config = tiny.changed(
        tasks={"train": 64, "held_out": 64},
        collect={"rows": 64, "replay_capacity": 6400, "warmup_steps": 640},
        train={"env_steps": 1280},
    )
    built = tiny.build(dataclasses.replace(config, seed=0))
    starts = built.init(built.keys).actors.env_state.observation[0]
    drawn = [
        np.arctan2(x["goal"][:, 1], x["goal"][:, 0]) for x in (built.train_tasks, built.held_out)
    ]
    drawn += list(starts.T)
    correlation = np.corrcoef(np.stack(drawn)) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 0.5
    # Nor do the purposes that one key serves anywhere: each has a number of its own, and none is
    # so small that `split` would give it too.
    found = [
        purpose
        for room in ("jmql", "experiments")
        for path in (Path(__file__).parents[1] / room).rglob("*.py")
        for purpose in re.findall(r'derive\([^()]*(?:\(\))?, "([^"]+)"\)', path.read_text())
    ]
    assert len(found) >= 12
    numbers = {zlib.crc32(purpose.encode()) for purpose in found}
    assert len(numbers) == len(set(found))
    assert min(numbers) > 10**6


def test_seed_of_many_equals_a_lone_run(cycle):
    def run(config: RunConfig, cycle):
        built = tiny.build(config)
        state, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE)
        return host_values(cycle(state, jnp.int32(2), FALSE))

    lone = run(dataclasses.replace(tiny.CONFIG, seed=4), cycle)
    three = dataclasses.replace(tiny.CONFIG, seed=3, seeds=3)
    many = run(three, functools.partial(jax.jit(tiny.build(three).cycle), measured=TRUE))
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
    goals = built.init(built.keys).actors.env_state.task["goal"][0]
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
            collect={"rows": 64, "replay_capacity": 6400, "warmup_steps": 640},
            train={"env_steps": 1280},
        )
        built = build(dataclasses.replace(config, split=split))
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

    saved, members = [], tiny.lone(built.config)
    state = built.init(built.keys)
    with Stop() as stop:
        rounds = host.loop(
            built, cycle, state, members, lambda state, *when: saved.append(when), stop, 0.0
        )
    # 6 rounds: 2 of warm-up, then two cycles of 2.
    assert len(fetched) == len(members[0].record) == 3
    assert saved == [(80, True), (160, False), (240, True)]
    assert rounds == 6


def test_warm_up_in_several_cycles_is_evaluated_once(built):
    """So that a signal is answered within a cycle; it goes on by what the replay holds."""
    config = tiny.changed(
        train={"rounds_per_cycle": 1, "env_steps": 200}, collect={"warmup_steps": 120}
    )
    short = dataclasses.replace(built, config=config)
    calls, saved, members = [], [], tiny.lone(config)

    def cycle(state, rounds, warmup, evaluating, numbers):
        calls.append((int(rounds), bool(warmup), bool(evaluating)))
        return state, *tiny.measured(int(state.rounds[0]), 1)

    state = built.init(built.keys)
    with Stop() as stop:
        host.loop(short, cycle, state, members, lambda _, *when: saved.append(when), stop, 0.0)
    # What fills the replay is a row too, for its blow-ups; only the last has returns.
    assert calls[:3] == [(1, True, False), (1, True, False), (1, True, True)]
    assert [sorted(x)[:2] for x in members[0].record[:3]] == [
        ["collect/blew_up", "env_steps"],
        ["collect/blew_up", "env_steps"],
        ["adapt/failed", "collect/blew_up"],
    ]
    assert saved[:3] == [(40, False), (80, False), (120, True)]


def test_a_run_that_is_stopped_in_its_warm_up_goes_on_as_if_nothing_had(built, cycle):
    config = tiny.changed(train={"rounds_per_cycle": 1, "env_steps": 160})
    short = dataclasses.replace(built, config=config)
    kept, members = [], [tiny.lone(config) for _ in range(2)]

    def save(state, steps, now):
        kept.append(jax.tree.map(jnp.copy, state))

    with Stop() as stop:
        begin = built.init(built.keys)
        host.loop(short, cycle, begin, members[0], save, stop, 0.0)
        straight = kept[-1]
        host.loop(short, cycle, kept[0], members[1], save, stop, 0.0)
    whole, rows = (member.record for (member,) in members)
    chex.assert_trees_all_equal(host_values(kept[-1]), host_values(straight))
    assert [row["env_steps"] for row in whole] == [40, 80, 120, 160]
    assert [row["env_steps"] for row in rows] == [80, 120, 160]
    for row, again in zip(whole[1:], rows, strict=True):
        for name in row.keys() - {"time/env_steps_per_second", "time/updates_per_second"}:
            np.testing.assert_equal(again[name], row[name])


def test_steps_are_counted_beyond_32_bits(built):
    long = dataclasses.replace(built, config=tiny.changed(train={"env_steps": 10**10}))
    members = tiny.lone(long.config)
    state = built.init(built.keys)
    state = state.replace(
        rounds=state.rounds + 10**10 // 40 - 2, memory=state.memory.replace(size=jnp.array([50]))
    )

    def cycle(state, rounds, warmup, evaluating, numbers):
        return state, *tiny.measured(10**10 // 40, 1)

    with Stop() as stop:
        assert host.loop(long, cycle, state, members, lambda *_: None, stop, 0.0) == 10**10 // 40
    assert [row["env_steps"] for row in members[0].record] == [10**10]


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
    fields = (config, built.env, built.learner)
    one = jax.jit(functools.partial(train.round, *fields))

    def rounds(key):
        state = train.init(*fields, built.train_tasks, key)
        for warmup, updates in ((TRUE, 0), (FALSE, 0), (FALSE, 6)):
            state, _ = one(state, warmup, updates)
        return state

    return jax.tree.leaves(rounds(built.keys[0]).agent.params)


@pytest.fixture(scope="module")
def unchanged():
    return trained(tiny.CONFIG)


@pytest.mark.parametrize("name", COLLECT)
def test_every_collect_setting_changes_the_result(name, unchanged):
    # `warmup_steps` is a number of rounds, see test_host_fetches_once_a_cycle.
    after = trained(tiny.changed(collect={name: COLLECT[name]}))
    assert any(not np.array_equal(x, y) for x, y in zip(unchanged, after, strict=True))
