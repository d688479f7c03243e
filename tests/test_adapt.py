"""Adaptation: what each step learns from, and what its settings do."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmql import adapt, networks, rollout
from jmql.config import AdaptConfig
from jmql.learner import NewData
from tests import tiny


@pytest.fixture(scope="module")
def built():
    return tiny.build()


@pytest.fixture(scope="module")
def state(built):
    return tiny.filled(built)


@pytest.fixture(scope="module")
def data(built, state):
    """Two episodes of a held-out task; the second is cut short by hand."""
    task = jax.tree.map(lambda x: x[0], built.held_out)
    policy = built.learner.greedy(built.learner.actor(state.agent), jnp.inf)

    @jax.jit
    def play(keys):
        def one(key):
            start = rollout.begin(built.env, built.env.reset(key, task), 5)
            return rollout.episode(built.env, policy, start, key)

        return jax.vmap(one)(keys)

    transitions, valid, _ = play(jax.random.split(jax.random.key(1), 2))
    return NewData(transitions, valid.at[1, 5:].set(False))


@pytest.fixture(scope="module")
def before(built, state, data):
    return run(built, state, data)


def run(built, state, data, memory=None):
    modules = networks.make(built.config.network, 2)

    @jax.jit
    def adapted(agent, memory):
        return adapt.adapt(built.config, modules, agent, data, memory, jax.random.key(2))

    return adapted(state.agent, state.memory if memory is None else memory)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(sum(jnp.sum((x - y) ** 2) for x, y in pairs))


def test_whole_buffer_weighs_valid_steps_equally(data):
    batch = adapt.whole(data, 5)
    weight = np.asarray(batch.weight).reshape(2, 20)
    np.testing.assert_allclose(weight[0], 40 / 25)
    np.testing.assert_allclose(weight[1, :5], 40 / 25)
    np.testing.assert_allclose(weight[1, 5:], 0)
    np.testing.assert_array_equal(
        batch.transition.observation, data.transitions.observation.reshape(40, 2)
    )
    np.testing.assert_array_equal(batch.history.mask[:4].sum(-1), [0, 1, 2, 3])
    np.testing.assert_array_equal(batch.history.mask[20:24].sum(-1), [0, 1, 2, 3])


def test_step1_sees_the_new_data_alone_and_step2_the_replay(built, state, data, before):
    adapted, _ = before
    other = jax.tree.map(lambda x: x, state.memory)
    other = other.replace(data=other.data.replace(reward=other.data.reward - 5.0))
    moved, _ = run(built, state, data, other)
    chex.assert_trees_all_equal(adapted.step1.params, moved.step1.params)
    assert distance(adapted.step2.params, moved.step2.params) > 0
    assert distance(adapted.step1.params, state.agent.params) > 0
    counts = (adapted.step1.updates, adapted.step2.updates)
    assert counts == (state.agent.updates + 2, state.agent.updates + 2 + 4)


@pytest.mark.parametrize("balanced", [True, False])
def test_classes_are_as_large_as_in_the_release_unless_balanced(balanced, state, data, before):
    """25 steps of new data, and of each of the 4 tasks 25 // 4 + 2 = 8. A classifier that may not
    use its features knows only how large the classes are.
    """
    config = tiny.changed(
        propensity={"inverse_regularization": 1e-4, "balanced": balanced, "newton_steps": 30}
    )
    _, metrics = run(tiny.build(config), state, data)
    odds = 1.0 if balanced else 25 / 32
    np.testing.assert_allclose(metrics["beta_mean"], odds, rtol=0.02)
    # After an early end the ratio is another one: 3 steps against 4 * 2.
    short = data._replace(valid=jnp.zeros((2, 20), bool).at[0, :3].set(True))
    _, metrics = run(tiny.build(config), state, short)
    np.testing.assert_allclose(metrics["beta_mean"], 1.0 if balanced else 3 / 8, rtol=0.02)


def test_the_classifier_sees_each_training_task_equally_often(built, state, data):
    batch, weight = adapt.draw_past(built.config, state.memory, data.valid, jax.random.key(0))
    assert weight.shape == (4 * (40 // 4 + 2),)
    assert weight.sum() == 4 * (25 // 4 + 2)
    # Where a transition came from: an observation stands in one row only, and row e is of task e.
    seen = np.asarray(state.memory.data.observation)
    rows = [
        int(np.argwhere((seen == x).all(-1))[0, 0])
        for x in np.asarray(batch.transition.observation)
    ]
    np.testing.assert_array_equal(rows, np.arange(48) % 4)
    assert set(np.asarray(rows)[np.asarray(weight) == 1].tolist()) == {0, 1, 2, 3}


def test_padding_teaches_nothing(built, state, data, before):
    late = ~data.valid
    transitions = data.transitions
    spoiled = transitions.replace(
        reward=jnp.where(late, 1e3, transitions.reward),
        observation=jnp.where(late[..., None], 7.0, transitions.observation),
    )
    adapted, metrics = before
    same, same_metrics = run(built, state, adapt.NewData(spoiled, data.valid))
    chex.assert_trees_all_close(adapted, same, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, same_metrics, rtol=1e-4, atol=1e-5)


def test_the_proximal_term_holds_step2_near_the_meta_trained_weights(built, state, data):
    free, held = (
        run(tiny.build(tiny.changed(adapt={"prox_coef": coef, "step2_updates": 30})), state, data)[
            0
        ]
        for coef in (0.0, 100.0)
    )
    meta = state.agent.params
    assert distance(held.step2.params, meta) < 0.5 * distance(free.step2.params, meta)


def test_ess_makes_lambda_of_each_batch(built, state, data):
    config = tiny.changed(adapt={"prox": "ess", "prox_coef": 2.0})
    _, metrics = run(tiny.build(config), state, data)
    assert 0 < metrics["prox_coef"] < 2.0
    uniform = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, reuse="uniform"))
    _, metrics = run(tiny.build(uniform), state, data)
    assert metrics["prox_coef"] == 0  # equal weights have an effective sample size of 1


OTHER = {
    "learning_rate": 1e-2,
    "step1_updates": 4,
    "step2_updates": 6,
    "batch_multiple": 3,
    "reuse": "uniform",
    "prox": "ess",
    "prox_coef": 1.0,
}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_changes_the_result(name, state, data, before):
    after, _ = run(tiny.build(tiny.changed(adapt={name: OTHER[name]})), state, data)
    assert distance(before[0].step2.params, after.step2.params) > 0
    # `episodes` is the amount of new data, see test_evaluate.py.
    assert set(OTHER) | {"episodes"} == {field.name for field in dataclasses.fields(AdaptConfig)}


@pytest.mark.parametrize("name", ["recent_per_task", "observation"])
def test_classifier_data_settings_change_the_result(name, state, data, before):
    value = {"recent_per_task": 2, "observation": True}[name]
    _, after = run(tiny.build(tiny.changed(propensity={name: value})), state, data)
    assert before[1]["beta_mean"] != after["beta_mean"]
