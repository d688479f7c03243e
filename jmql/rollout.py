"""Acting: the same step for exploring and for evaluation, one row at a time, to be vmapped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jmql.networks import Networks
from jmql.types import Array, Env, History, Key, Params, Task, Transition

# (observation [O], history [H], key) -> action [A]
Policy = Callable[[Array, History, Key], Array]


class ActorCarry(struct.PyTreeNode):
    """A row between two steps."""

    env_state: Any  # an EnvState, in an episode that has not ended
    history: History  # [H]
    episode_return: Array  # [] sum of rewards since the episode began


class Finished(struct.PyTreeNode):
    """Episodes that ended within a rollout."""

    return_sum: Array  # [] sum of their returns
    count: Array  # [] how many


def greedy(networks: Networks, actor_params: Params) -> Policy:
    """The deterministic policy."""
    return lambda observation, history, key: networks.actor.apply(
        actor_params, observation, history
    )


def exploring(networks: Networks, actor_params: Params, noise: float, warmup: Array) -> Policy:
    """The policy with Gaussian noise, clipped; uniform actions where `warmup` [] is True."""

    def policy(observation: Array, history: History, key: Key) -> Array:
        noise_key, uniform_key = jax.random.split(key)
        action = networks.actor.apply(actor_params, observation, history)
        action = action + noise * jax.random.normal(noise_key, action.shape)
        uniform = jax.random.uniform(uniform_key, action.shape, minval=-1.0, maxval=1.0)
        return jnp.where(warmup, uniform, jnp.clip(action, -1.0, 1.0))

    return policy


def begin(env: Env, key: Key, task: Task, history_length: int) -> ActorCarry:
    """Begins the first episode of a row, with an empty history."""
    env_state = env.reset(key, task)
    observation = env_state.observation
    history = History(
        jnp.zeros((history_length, *observation.shape)),
        jnp.zeros((history_length, env.action_size)),
        jnp.zeros(history_length),
        jnp.zeros(history_length, bool),
    )
    return ActorCarry(env_state, history, jnp.zeros(()))


def push(history: History, observation: Array, action: Array, reward: Array) -> History:
    """Returns the history [H] one step later: the oldest step leaves, the newest comes last."""
    new = History(observation, action, reward, jnp.ones((), bool))
    return jax.tree.map(lambda old, x: jnp.concatenate([old[1:], x[None]]), history, new)


def collect(
    env: Env,
    policy: Policy,
    carry: ActorCarry,
    key: Key,
    length: int,
    cut: Array | int | None = None,
) -> tuple[ActorCarry, Transition, Finished]:
    """Takes `length` steps of one row; an episode that ends is followed by a fresh one.

    Args:
        env: the family.
        policy: chooses actions.
        carry: the row before.
        key: for actions and resets.
        length: T.
        cut: truncates episodes after so many steps, beside the environment's own limit.

    Returns:
        The row after, its transitions [T], and the episodes that ended.
    """

    def step(carry: ActorCarry, key: Key) -> tuple[ActorCarry, tuple[Transition, Finished]]:
        action_key, reset_key = jax.random.split(key)
        state, history = carry.env_state, carry.history
        action = policy(state.observation, history, action_key)
        after = env.step(state, action)
        truncated = after.truncated
        if cut is not None:
            truncated = (truncated | (after.step >= cut)) & ~after.terminated
        transition = Transition(
            state.observation,
            action,
            after.reward,
            after.terminated,
            truncated,
            after.observation,
            state.step,
        )
        episode_return = carry.episode_return + after.reward
        ended = after.terminated | truncated
        going = ActorCarry(
            after, push(history, state.observation, action, after.reward), episode_return
        )
        fresh = begin(env, reset_key, state.task, len(history.mask))
        carry = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, going)
        return carry, (transition, Finished(jnp.where(ended, episode_return, 0.0), ended))

    carry, (transitions, finished) = jax.lax.scan(step, carry, jax.random.split(key, length))
    return carry, transitions, jax.tree.map(lambda x: x.sum(0), finished)


def episode(
    env: Env, policy: Policy, task: Task, key: Key, history_length: int
) -> tuple[Transition, Array]:
    """Plays one episode from a fresh reset.

    Returns:
        Transitions [episode_length], and which of them belong to the episode, [episode_length]
        bool: after an early end the rest is padding.
    """
    begin_key, collect_key = jax.random.split(key)
    carry = begin(env, begin_key, task, history_length)
    _, transitions, _ = collect(env, policy, carry, collect_key, env.episode_length)
    ended = (transitions.terminated | transitions.truncated).astype(jnp.int32)
    return transitions, jnp.cumsum(ended) - ended == 0
