"""Studies of a trained run: ways to adapt beside each other, and what is said of their returns."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from experiments import evaluate, program, run, statistics
from jmql.settings import ConfigError
from tests import tiny


@pytest.fixture(scope="module")
def built():
    return tiny.build(tiny.changed(adapt={"shots": 2, "learning_rate": 1e-2, "new_share": 0.5}))


@pytest.fixture(scope="module")
def state(built):
    return jax.tree.map(lambda x: x[None], tiny.filled(built))


def study(built, state, changes=None, data=None, updates=4):
    """What is found with five tasks."""
    tasks = built.env.sample_tasks(jax.random.key(1), 5)
    other = evaluate.changed(built, changes or {})
    return evaluate.prepare(other, state, tasks, jax.random.key(2), data, True)(updates)


@pytest.fixture(scope="module")
def as_set(built, state):
    return study(built, state)


def test_a_study_has_what_it_is_asked_for(as_set):
    metrics, data = as_set
    assert metrics["return_shot1"].shape == (1, 5)
    assert metrics["reuse"].shape == (1, 5, 4)
    assert data.valid.shape == (1, 5, 2, 20)


def test_the_number_of_updates_is_what_is_asked_for_whatever_the_settings_say(built, state, as_set):
    more = study(built, state, {"updates": 4}, updates=1)
    assert (more.metrics["return_post"] != as_set.metrics["return_post"]).all()
    same = study(built, state, {"updates": 1}, updates=4)
    chex.assert_trees_all_close(same, as_set, rtol=1e-5, atol=1e-6)


def test_ablations_are_other_ways_to_adapt(built, state, as_set):
    returns = [as_set.metrics["return_post"][0, 0]]
    for name in ("weights of one", "new data alone"):
        found = study(built, state, evaluate.ABLATIONS[name])
        np.testing.assert_array_equal(found.metrics["return_pre"], as_set.metrics["return_pre"])
        returns.append(found.metrics["return_post"][0, 0])
    assert len(set(returns)) == 3


def test_from_nothing_shares_the_data_and_no_weight(built, state, as_set):
    """Other weights of the meta-trained agent, and another replay, change nothing."""
    changes, data = evaluate.ABLATIONS["from nothing"], as_set.data
    found = study(built, state, changes, data)
    assert (found.metrics["return_pre"] != as_set.metrics["return_pre"]).all()
    chex.assert_trees_all_equal(found.data, data)
    other = state.replace(
        agent=jax.tree.map(lambda x: 2 * x, state.agent),
        memory=state.memory.replace(
            data=state.memory.data.replace(reward=state.memory.data.reward - 5.0)
        ),
    )
    again = study(built, other, changes, data)
    for name in ("return_pre", "return_shot1", "return_post"):
        np.testing.assert_array_equal(again.metrics[name], found.metrics[name])
    # But the data counts.
    worse = data._replace(transitions=data.transitions.replace(reward=data.transitions.reward * 3))
    again = study(built, state, changes, worse)
    assert (again.metrics["return_post"] != found.metrics["return_post"]).any()


def test_an_oracle_plays_as_often_and_does_not_adapt(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, observe_task=True, runs=str(tmp_path))
    made = program.build(config)
    folder = run.create(made)
    with run.checkpoints(folder, made.config) as files:
        files.save(0, made.init(made.keys))
        files.wait()
    other = tiny.build(tiny.changed(evaluate={"episodes": 3}, adapt={"shots": 2}))
    oracle, state = evaluate._oracle(other, folder)
    assert oracle.config.evaluate.episodes == 3
    tasks = oracle.env.sample_tasks(jax.random.key(1), 2)
    found = evaluate.prepare(oracle, state, tasks, jax.random.key(2))(0).metrics
    np.testing.assert_array_equal(found["return_pre"], found["return_shot1"])
    np.testing.assert_array_equal(found["return_pre"], found["return_post"])
    point = dataclasses.replace(other.config, task="point_sparse")
    with pytest.raises(ConfigError, match="whose task is point_goal; valid: a run whose task is"):
        evaluate._oracle(dataclasses.replace(other, config=point), folder)


def test_the_gain_is_over_no_adaptation_whatever_is_shown():
    metrics = {"return_pre": np.full((1, 4), -10.0), "return_post": np.full((1, 4), -4.0)}
    shown = evaluate._cells(evaluate.Result(metrics, None), ["return_post"])
    assert shown == ["-4.0\n[-4.0, -4.0]", "6.0\n[6.0, 6.0]", "-4.0"]


def test_interquartile_mean_and_worst_fifth():
    values = np.array([[100.0, 1, 2, 3, 4, 5, 6, -100]])
    assert statistics.interquartile_mean(values)[0] == 3.5  # of 2, 3, 4, 5
    assert statistics.worst_fifth(values)[0] == -49.5  # of -100 and 1


def test_intervals_hold_the_mean_as_often_as_they_say():
    """Normal values of 20 tasks: the interval is that of Student's t, a little narrower."""
    rng = np.random.default_rng(1)
    held = widths = 0
    for _ in range(200):
        values = rng.normal(size=(1, 20))
        low, high = statistics.interval(values, statistics.mean)
        held += low < 0 < high
        widths += (high - low) / 200
    assert 0.86 < held / 200 < 0.98
    np.testing.assert_allclose(widths, 2 * 1.96 / np.sqrt(20), rtol=0.1)


def test_seeds_that_share_their_tasks_are_no_new_tasks():
    """Values that depend on the task alone: ten seeds are as uncertain as one."""
    tasks = np.random.default_rng(2).normal(size=(1, 20))
    one = np.diff(statistics.interval(tasks, statistics.mean))
    ten = np.diff(statistics.interval(np.repeat(tasks, 10, axis=0), statistics.mean))
    np.testing.assert_allclose(ten, one, rtol=0.1)
