"""What networks see, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from jmql import inputs, mql, replay
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


def test_what_never_varies_is_seen_as_zero():
    scale = inputs.Scale(
        inputs.Moments(jnp.full(2, 5.0), jnp.zeros(2)), inputs.Moments(*jnp.zeros(2)), jnp.ones(())
    )
    history = History(jnp.full((H, 2), 5.0), jnp.zeros((H, 1)), jnp.zeros(H), jnp.ones(H, bool))
    observation, history = inputs.show(scale, jnp.full(2, 5.0), history)
    assert not observation.any()
    assert not history.observation.any()
    assert not history.reward.any()


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
    acts = [
        built.learner.greedy(x, jnp.int32(H))(jnp.ones(2), one, jax.random.key(0))[0]
        for x in (actor, moved)
    ]
    assert not np.allclose(*acts)


def test_without_a_scale_networks_see_all_as_it_is():
    built = tiny.build(tiny.changed(network={"normalize": False}))
    assert tiny.filled(built).agent.scale is None
    history = History(*[jnp.ones(3)] * 4)
    assert inputs.show(None, history.reward, history) == (history.reward, history)
