"""What networks see, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmql import inputs, mql, replay, td3
from jmql.learner import NewData
from jmql.types import History
from tests import tiny
from tests.test_replay import make_rows, take

E, C, T, H = 3, 12, 4, 5


def make_rollout(rounds, units=(3.0, 0.1), shift=7.0):
    """Returns transitions [E, rounds * T] of walks, and the replay after each T steps."""
    steps = rounds * T
    transitions, _ = make_rows(E, steps, [5, 9, 2])
    random = np.random.default_rng(0)
    walk = np.array(units) * random.normal(size=(E, steps + 1, 2)).cumsum(1) + shift
    reward = units[0] * random.normal(-9.0, 4.0, size=(E, steps)) + shift
    transitions = transitions.replace(
        observation=walk[:, :-1].astype(np.float32),
        next_observation=walk[:, 1:].astype(np.float32),
        reward=reward.astype(np.float32),
    )
    memories = [replay.init(jax.tree.map(lambda x: jnp.asarray(x[0, 0]), transitions), E, C)]
    for first in range(0, steps, T):
        memories.append(replay.add(memories[-1], take(transitions, slice(first, first + T))))
    return transitions, memories[1:]


def scaled(memories):
    scale, update = inputs.init(2), jax.jit(inputs.update, static_argnums=2)
    for memory in memories:
        scale = update(scale, memory, T)
    return scale


def test_the_scale_is_that_of_all_steps_so_far_though_the_ring_has_lost_some():
    transitions, memories = make_rollout(rounds=7)
    assert 7 * T > 2 * C
    scale = scaled(memories)
    assert int(scale.count) == E * 7 * T
    for moments, x in (
        (scale.observation, transitions.observation),
        (scale.reward, transitions.reward),
    ):
        np.testing.assert_allclose(moments.mean, x.mean((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(moments.variance, x.var((0, 1)), rtol=1e-3)


def test_networks_see_what_is_scaled_and_learn_from_what_was_earned():
    _, memories = make_rollout(rounds=3)
    scale = scaled(memories)

    def expected(x, moments):
        x, moments = np.asarray(x), jax.tree.map(np.asarray, moments)
        return np.clip((x - moments.mean) / np.sqrt(moments.variance), -10, 10)

    batch = replay.windows(memories[-1].data, jnp.arange(E), jnp.full(E, 8), H)
    far = batch.transition.observation.at[0].set(1e6)  # but not too far
    batch = batch.replace(transition=batch.transition.replace(observation=far))
    shown = inputs.show_batch(scale, batch)
    for found, x in (
        (shown.transition.observation, batch.transition.observation),
        (shown.transition.next_observation, batch.transition.next_observation),
        (shown.history.observation, batch.history.observation),
        (shown.next_history.observation, batch.next_history.observation),
    ):
        np.testing.assert_allclose(found, expected(x, scale.observation), rtol=1e-4, atol=1e-4)
    for found, x in (
        (shown.history.reward, batch.history.reward),
        (shown.next_history.reward, batch.next_history.reward),
    ):
        np.testing.assert_allclose(found, expected(x, scale.reward), rtol=1e-4, atol=1e-4)
    assert np.array_equal(shown.transition.reward, batch.transition.reward)
    assert np.array_equal(shown.history.action, batch.history.action)
    assert np.array_equal(shown.history.mask, batch.history.mask)


def test_the_units_of_observations_and_rewards_do_not_matter():
    def see(memories):
        batch = replay.windows(memories[-1].data, jnp.arange(E), jnp.full(E, 7), H)
        batch = inputs.show_batch(scaled(memories), batch)
        return batch.transition.observation, batch.history

    (_, one), (_, other) = make_rollout(5), make_rollout(5, units=(40.0, 2.0), shift=-50.0)
    for here, there in zip(jax.tree.leaves(see(one)), jax.tree.leaves(see(other)), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-3)


def test_changes_are_seen_within_an_episode_over_their_deviations():
    transitions, memories = make_rollout(rounds=7)
    scale, update = inputs.init(2, changes=True), jax.jit(inputs.update, static_argnums=2)
    for memory in memories:
        scale = update(scale, memory, T)
    assert scale.observation.mean.tolist() == scaled(memories).observation.mean.tolist()
    # Of the pairs of steps of each round that are of one episode.
    both = np.concatenate([transitions.observation, transitions.reward[..., None]], axis=-1)
    inside = (np.arange(7 * T - 1) + 1) % T > 0
    changes = np.diff(both, axis=1)[(transitions.step[:, 1:] > 0) & inside]
    assert int(scale.changes.count) == len(changes) < E * 7 * (T - 1)
    deviation = np.sqrt(np.square(changes).mean(0))
    found = np.append(scale.changes.observation, scale.changes.reward)
    np.testing.assert_allclose(found, deviation**2, rtol=1e-3)

    batch = replay.windows(memories[-1].data, jnp.arange(E), jnp.full(E, 8), H)
    history, plain = batch.history, inputs.show_batch(scaled(memories), batch).history
    shown = inputs.show_batch(scale, batch).history
    np.testing.assert_array_equal(shown.observation[..., :2], plain.observation)
    np.testing.assert_array_equal(shown.reward, plain.reward)
    both = np.concatenate([history.observation, history.reward[..., None]], axis=-1)
    known = np.asarray(history.mask)[:, 1:] & np.asarray(history.mask)[:, :-1]
    assert 0 < known.sum() < known.size
    expected = np.clip(np.diff(both, axis=1) / deviation, -10, 10) * known[..., None]
    np.testing.assert_allclose(shown.observation[:, 1:, 2:], expected, rtol=1e-3, atol=1e-4)
    assert not np.asarray(shown.observation[:, 0, 2:]).any()


def test_what_never_varies_is_seen_as_zero():
    scale = inputs.Scale(
        inputs.Moments(jnp.full(2, 5.0), jnp.zeros(2)), inputs.Moments(*jnp.zeros(2)), jnp.ones(())
    )
    history = History(jnp.full((H, 2), 5.0), jnp.zeros((H, 1)), jnp.zeros(H), jnp.ones(H, bool))
    observation, history = inputs.show(scale, jnp.full(2, 5.0), history)
    assert not observation.any()
    assert not history.observation.any()
    assert not history.reward.any()


@pytest.fixture(scope="module")
def twins():
    """A program whose agent sees what is scaled, and its state; and the same where that is in the
    data: its observations are scaled by NumPy, and nothing is to be scaled. Rewards never are."""
    free = {"propensity": {"observation": True}}
    built = [tiny.build(tiny.changed(network={"normalize": x}, **free)) for x in (True, False)]
    state = tiny.filled(built[0])
    moments = inputs.Moments(jnp.array([0.5, -0.2]), jnp.array([0.3, 4.0]))
    still = jnp.float32(1e12)  # steps: no others move it
    scale = inputs.Scale(moments, inputs.Moments(jnp.zeros(()), jnp.ones(())), still)
    agent = state.agent.replace(scale=scale)
    return (built[0], agent, state.memory), (built[1], unscaled(agent), in_the_data(state.memory))


def unscaled(agent):
    return td3.AgentState(agent.params, agent.target_params, agent.opt_state, agent.updates)


def in_the_data(tree):
    """Returns transitions, or a replay of them, with the observations of `twins` scaled."""

    def change(x):
        return (x - np.array([0.5, -0.2])) / np.sqrt(np.array([0.3, 4.0]))

    if isinstance(tree, replay.ReplayState):
        return tree.replace(data=in_the_data(tree.data))
    return tree.replace(
        observation=jnp.float32(change(np.asarray(tree.observation))),
        next_observation=jnp.float32(change(np.asarray(tree.next_observation))),
    )


def assert_equal(one, other):
    for here, there in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(here, there, rtol=2e-4, atol=2e-5)


def test_a_learner_learns_from_what_is_scaled(twins):
    def learned(built, agent, memory):
        learn = jax.jit(built.learner.learn)
        return learn(agent, memory, {}, jax.random.key(1), jnp.array(True), jnp.int32(0))

    (one, sums), (other, same_sums) = (learned(*twin) for twin in twins)
    assert_equal((unscaled(one), sums), (other, same_sums))
    before = twins[0][1]
    assert not np.allclose(*(jax.flatten_util.ravel_pytree(x.params)[0] for x in (one, before)))


def test_an_agent_adapts_with_what_is_scaled_and_its_scale_stands_still(twins):
    built, agent, memory = twins[0]
    data = NewData(
        jax.tree.map(lambda x: x[:1, :20], memory.data),
        jnp.ones((1, 20), bool).at[:, 15:].set(False),
    )

    def adapted(built, agent, memory, data):
        begun, key = built.learner.begin(agent), jax.random.key(2)
        return jax.jit(built.learner.adapt)(agent, begun, data, memory, key, jnp.int32(0))

    found, diagnostics = adapted(built, agent, memory, data)
    scaled_data = NewData(in_the_data(data.transitions), data.valid)
    other, same_diagnostics = adapted(*twins[1], scaled_data)
    for one, same in zip(found, other, strict=True):
        assert_equal((one.params, diagnostics), (same.params, same_diagnostics))
        assert_equal(one.scale, agent.scale)


def test_a_learner_scales_what_it_collects_and_acts_on_it():
    built = tiny.build()
    agent = tiny.filled(built).agent
    assert int(agent.scale.count) == built.config.steps_per_round  # of warm-up
    actor = built.learner.actor(agent)
    moved = mql.Acting(
        actor.weights,
        actor.scale.replace(observation=inputs.Moments(jnp.full(2, 3.0), jnp.ones(2))),
    )
    one = History(jnp.ones((H, 2)), jnp.ones((H, 2)), jnp.ones(H), jnp.ones(H, bool))
    for act in (
        lambda x: built.learner.greedy(x, jnp.int32(H)),
        lambda x: built.learner.explore(x, jnp.array(False)),
    ):
        here, there = (act(x).act(jnp.ones(2), one, jax.random.key(0))[0] for x in (actor, moved))
        assert not np.allclose(here, there)


def test_without_a_scale_networks_see_all_as_it_is():
    built = tiny.build(tiny.changed(network={"normalize": False}))
    assert tiny.filled(built).agent.scale is None
    history = History(*[jnp.ones(3)] * 4)
    assert inputs.show(None, history.reward, history) == (history.reward, history)
