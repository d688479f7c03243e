"""Acting: the same step for exploring and for evaluation, one row at a time, to be vmapped."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jmql.types import Array, Env, History, Key, Metrics, Policy, Transition


class ActorCarry(struct.PyTreeNode):
    """A row between two steps."""

    env_state: Any  # an EnvState, in an episode that has not ended
    history: History  # [H]
    episode_return: Array  # [] sum of rewards since the episode began


class Finished(struct.PyTreeNode):
    """Episodes that ended within a rollout.

    Where the physics was not finite, the steps that were left count as the worst.
    """

    return_sum: Array  # [] sum of their returns
    count: Array  # [] how many
    blew_up: Array  # [] how many because the physics was not finite
    extras: Metrics  # [] sums of what their last states report


def no_episodes(extras: Metrics) -> Finished:
    """Returns the sums over no episodes, of which `extras` names what else is reported."""
    zero = jnp.zeros(())
    return Finished(zero, zero, zero, dict.fromkeys(extras, zero))


def means(finished: Finished) -> Metrics:
    """Returns `return` and the extras, [] each: means over episodes, NaN over none."""
    sums = {"return": finished.return_sum} | finished.extras
    return {name: total / finished.count for name, total in sums.items()}


def begin(env: Env, env_state: Any, history_length: int) -> ActorCarry:
    """Returns a row at the start of an episode: a reset state and an empty history."""
    history = History(
        jnp.zeros((history_length, *env_state.observation.shape)),
        jnp.zeros((history_length, env.action_size)),
        jnp.zeros(history_length),
        jnp.zeros(history_length, bool),
    )
    return ActorCarry(env_state, history, jnp.zeros(()))


def push(history: History, observation: Array, action: Array, reward: Array) -> History:
    """Returns the history [H] one step later: the oldest step leaves, the newest comes last."""
    new = History(observation, action, reward, jnp.ones((), bool))
    return jax.tree.map(lambda old, x: jnp.concatenate([old[1:], x[None]]), history, new)


def act(env: Env, policy: Policy, carry: ActorCarry, key: Key) -> tuple[ActorCarry, Transition]:
    """Takes one step of one row and remembers it, whether or not the episode ends."""
    before, history = carry.env_state, carry.history
    action, behaviour = policy(before.observation, history, key)
    after = env.step(before, action)
    transition = Transition(
        before.observation,
        action,
        after.reward,
        after.terminated,
        after.truncated,
        after.observation,
        before.step,
        behaviour,
    )
    history = push(history, before.observation, action, after.reward)
    return ActorCarry(after, history, carry.episode_return + after.reward), transition


def collect(
    env: Env, policy: Policy, carry: ActorCarry, key: Key, length: int, cut: Array | int
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
        carry, transition = act(env, policy, carry, action_key)
        late = carry.env_state.step >= cut
        truncated = (transition.truncated | late) & ~transition.terminated
        ended = transition.terminated | truncated
        finished = _finished(env, carry, ended, jnp.minimum(cut, env.episode_length))
        reset = env.reset(reset_key, carry.env_state.task)
        fresh = begin(env, reset, len(carry.history.mask))
        carry = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, carry)
        return carry, (transition.replace(truncated=truncated), finished)

    carry, (transitions, finished) = jax.lax.scan(step, carry, jax.random.split(key, length))
    return carry, transitions, jax.tree.map(lambda x: x.sum(0), finished)


def _finished(env: Env, carry: ActorCarry, ended: Array, length: Array | int) -> Finished:
    """Describes the episode of a row that may have ended [] with this step."""
    blew_up = carry.env_state.blew_up & ended
    lost = jnp.where(blew_up, length - carry.env_state.step, 0) * env.worst_reward
    earned, extras = jax.tree.map(
        lambda x: jnp.where(ended, x, 0.0), (carry.episode_return + lost, carry.env_state.extras)
    )
    return Finished(earned, ended, blew_up, extras)


def episode(
    env: Env, policy: Policy, start: ActorCarry, key: Key
) -> tuple[Transition, Array, Finished]:
    """Plays one episode of one row from its start.

    Returns:
        Transitions [episode_length]; which of them belong to the episode, [episode_length] bool:
        after an early end the rest is padding; and its return.
    """

    def step(
        carry: tuple[ActorCarry, Array], key: Key
    ) -> tuple[tuple[ActorCarry, Array], tuple[Transition, Array, Finished]]:
        row, running = carry
        row, transition = act(env, policy, row, key)
        ended = running & (transition.terminated | transition.truncated)
        finished = _finished(env, row, ended, env.episode_length)
        return (row, running & ~ended), (transition, running, finished)

    keys = jax.random.split(key, env.episode_length)
    begin = (start, jnp.ones((), bool))
    _, (transitions, valid, finished) = jax.lax.scan(step, begin, keys)
    return transitions, valid, jax.tree.map(lambda x: x.sum(0), finished)
