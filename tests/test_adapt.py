"""Adaptation: what each step learns from, and what its settings do."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmql import adapt, inputs, networks, propensity, replay, rollout, td3
from jmql.config import AdaptConfig
from jmql.keys import derive
from jmql.learner import NewData
from tests import tiny


def changed(**adapt):
    """The tiny configuration, with two episodes of new data."""
    return tiny.changed(adapt={"episodes": 2} | adapt)


@pytest.fixture(scope="module")
def built():
    return tiny.build(changed())


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
            start = rollout.begin(policy, built.env.reset(key, task))
            return rollout.episode(built.env, policy, start, key)

        return jax.vmap(one)(keys)

    transitions, valid, *_ = play(jax.random.split(jax.random.key(1), 2))
    return NewData(transitions, valid.at[1, 5:].set(False))


@pytest.fixture(scope="module")
def before(built, state, data):
    return run(built, state, data)


def run(built, state, data, memory=None, shot=0):
    modules = networks.make(built.config.network, 2)

    @jax.jit
    def adapted(meta, memory, shot):
        agent = built.learner.begin(meta)
        key = jax.random.key(2)
        return adapt.adapt(built.config, modules, meta, agent, data, memory, key, shot)

    return adapted(state.agent, state.memory if memory is None else memory, jnp.int32(shot))


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
    assert distance(adapted.agent.params, moved.agent.params) > 0
    assert distance(adapted.step1.params, state.agent.params) > 0
    counts = (adapted.step1.updates, adapted.agent.updates)
    assert counts == (state.agent.updates + 2, state.agent.updates + 2 + 4)


def test_without_new_data_in_its_batches_a_shot_is_the_papers_procedure(built, state, data):
    """Step by step: all new data in each batch of step 1, then weighted replay with the anchor."""
    config, scale, key = built.config, state.agent.scale, jax.random.key(2)
    modules, td3_config = (
        networks.make(config.network, 2),
        dataclasses.replace(config.td3, learning_rate=config.adapt.learning_rate),
    )
    assert config.adapt.new_share == 0

    def contexts(batch):
        return modules.context(state.agent.params["actor"], batch.history)

    @jax.jit
    def paper(meta, memory):
        fresh = inputs.show_batch(scale, adapt.whole(data, 5))
        past, weight = adapt.draw_past(config, memory, data.valid, derive(key, "classifier"))
        past = inputs.show_batch(scale, past)
        features = jnp.concatenate([contexts(fresh), contexts(past)])
        is_replay = jnp.arange(len(features)) >= 40
        weight = jnp.concatenate([data.valid.reshape(-1), weight])
        classifier = propensity.fit(config.propensity, features, is_replay, weight)
        agent = td3.fresh_optimizer(meta)
        for i in range(2 + 4):
            purpose, index = ("step 1", i) if i < 2 else ("step 2", i - 2)
            draw, noise = jax.random.split(jax.random.fold_in(derive(key, purpose), index))
            batch, pull = fresh, {}
            if i >= 2:
                batch = replay.sample_whole(memory, derive(draw, "replay"), 32, 5)
                batch = inputs.show_batch(scale, batch)
                odds = propensity.log_odds(classifier, contexts(batch))
                beta = propensity.importance_weights(config.propensity, odds)
                batch, pull = batch.replace(weight=beta), {"anchor": meta.params, "prox_coef": 0.1}
            noise = jax.random.normal(noise, batch.transition.action.shape)
            agent, _ = td3.update(td3_config, modules, agent, batch, noise, index % 2 == 0, **pull)
        return agent

    adapted, _ = run(built, state, data)
    chex.assert_trees_all_close(
        adapted.agent, paper(state.agent, state.memory), rtol=1e-5, atol=1e-6
    )


def test_later_shots_have_no_step_of_new_data_alone(built, state, data):
    adapted, _ = run(built, state, data, shot=1)
    chex.assert_trees_all_equal(adapted.step1.params, state.agent.params)
    assert adapted.agent.updates == state.agent.updates + 4


def test_batches_are_of_new_data_and_replay_as_asked_for(state, data):
    other = state.memory.replace(
        data=state.memory.data.replace(reward=state.memory.data.reward - 5.0)
    )
    new = data._replace(transitions=data.transitions.replace(reward=data.transitions.reward - 5.0))
    for share, of_replay, of_new in ((0.0, True, False), (0.5, True, True), (1.0, False, True)):
        built = tiny.build(changed(new_share=share, step1_updates=0, reuse="uniform"))
        params = [
            run(built, state, *inputs)[0].agent.params
            for inputs in ((data,), (data, other), (new,))
        ]
        assert (distance(params[0], params[1]) > 0) == of_replay
        assert (distance(params[0], params[2]) > 0) == of_new


def test_new_data_is_drawn_evenly_from_the_steps_there_are(data):
    """25 steps, the last five of the second episode's."""
    batch = adapt.draw_new(data, jax.random.key(0), 5000, 5)
    seen = data.transitions.observation.reshape(40, 2)
    which = np.argmin(
        np.abs(np.asarray(seen)[None] - np.asarray(batch.transition.observation)[:, None]).sum(-1),
        1,
    )
    counts = np.bincount(which, minlength=40)
    assert (counts[25:] == 0).all()
    np.testing.assert_allclose(counts[:25], 200, atol=60)  # four standard deviations
    np.testing.assert_array_equal(batch.history.mask.sum(-1), np.minimum(which % 20, 5))
    assert (batch.weight == 1).all()


def test_the_map_of_reuse_finds_the_task_that_the_new_data_is_of(built, state, data):
    """The context tells tasks by their rewards: those of the third are as those of the new."""
    rewards = state.memory.data.reward
    memory = state.memory.replace(
        data=state.memory.data.replace(reward=jnp.full_like(rewards, 5.0).at[2].set(rewards[2]))
    )
    _, metrics = run(built, state, data, memory)
    assert metrics["reuse"].shape == (4,)
    np.testing.assert_allclose(metrics["reuse"].sum(), 1.0, rtol=1e-5)
    assert metrics["reuse"][2] > 0.5


@pytest.mark.parametrize("balanced", [True, False])
def test_classes_are_as_large_as_in_the_release_unless_balanced(balanced, state, data, before):
    """25 steps of new data, and of each of the 4 tasks 25 // 4 + 2 = 8. A classifier that may not
    use its features knows only how large the classes are.
    """
    weak = {"inverse_regularization": 1e-4, "balanced": balanced, "newton_steps": 30}
    config = tiny.changed(adapt={"episodes": 2}, propensity=weak)
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
    same, same_metrics = run(built, state, NewData(spoiled, data.valid))
    chex.assert_trees_all_close(adapted, same, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, same_metrics, rtol=1e-4, atol=1e-5)


def test_the_proximal_term_holds_step2_near_the_meta_trained_weights(built, state, data):
    free, held = (
        run(tiny.build(changed(prox_coef=coef, updates=30)), state, data)[0].agent.params
        for coef in (0.0, 100.0)
    )
    meta = state.agent.params
    assert distance(held, meta) < 0.5 * distance(free, meta)


def test_ess_makes_lambda_of_each_batch(built, state, data):
    config = changed(prox="ess", prox_coef=2.0)
    _, metrics = run(tiny.build(config), state, data)
    assert 0 < metrics["prox_coef"] < 2.0
    uniform = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, reuse="uniform"))
    _, metrics = run(tiny.build(uniform), state, data)
    assert metrics["prox_coef"] == 0  # equal weights have an effective sample size of 1


OTHER = {
    "learning_rate": 1e-2,
    "tau": 0.5,
    "step1_updates": 4,
    "updates": 6,
    "new_share": 0.5,
    "batch_multiple": 3,
    "reuse": "uniform",
    "prox": "ess",
    "prox_coef": 1.0,
}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_changes_the_result(name, state, data, before):
    after, _ = run(tiny.build(changed(**{name: OTHER[name]})), state, data)
    assert distance(before[0].agent.params, after.agent.params) > 0
    # How new data come about is for test_evaluate.py.
    amount = {"shots", "episodes", "exploration_noise"}
    assert set(OTHER) | amount == {field.name for field in dataclasses.fields(AdaptConfig)}


@pytest.mark.parametrize("name", ["recent_per_task", "observation"])
def test_classifier_data_settings_change_the_result(name, state, data, before):
    value = {"recent_per_task": 2, "observation": True}[name]
    config = tiny.changed(adapt={"episodes": 2}, propensity={name: value})
    _, after = run(tiny.build(config), state, data)
    assert before[1]["beta_mean"] != after["beta_mean"]
