"""Acting: the same step for exploring and for evaluation, one row at a time, to be vmapped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jmql.types import Array, Env, History, Key, Metrics, Policy, Transition


class ActorCarry(struct.PyTreeNode):
    """A row between two steps."""

    env_state: Any  # an EnvState, in an episode that has not ended
    history: Any  # what the policy remembers
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


def begin(policy: Policy, env_state: Any) -> ActorCarry:
    """Returns a row at the start of an episode: a reset state, and nothing to remember."""
    return ActorCarry(env_state, policy.start(env_state.observation), jnp.zeros(()))


def windowed(
    act: Callable[[Array, History, Key], tuple[Array, Any]],
    action_size: int,
    history_length: int,
    context: Callable[[History], Array] = lambda history: jnp.zeros(0),
) -> Policy:
    """Returns a policy that remembers the last steps of an episode.

    Args:
        act: of an observation [O], those steps [H] and a key: as `Policy.act`.
        action_size: A.
        history_length: H.
        context: of those steps: as `Policy.context`.
    """

    def start(observation: Array) -> History:
        return History(
            jnp.zeros((history_length, *observation.shape)),
            jnp.zeros((history_length, action_size)),
            jnp.zeros(history_length),
            jnp.zeros(history_length, bool),
        )

    return Policy(start, act, push, context)


def push(history: History, step: Transition) -> History:
    """Returns the history [H] one step later: the oldest step leaves, the newest comes last."""
    new = History(step.observation, step.action, step.reward, jnp.ones((), bool))
    return jax.tree.map(lambda old, x: jnp.concatenate([old[1:], x[None]]), history, new)


def act(env: Env, policy: Policy, carry: ActorCarry, key: Key) -> tuple[ActorCarry, Transition]:
    """Takes one step of one row and remembers it, whether or not the episode ends."""
    before, history = carry.env_state, carry.history
    action, behaviour = policy.act(before.observation, history, key)
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
    history = policy.remember(history, transition)
    return ActorCarry(after, history, carry.episode_return + after.reward), transition


def collect(
    env: Env, policy: Policy, carry: ActorCarry, key: Key, length: int, cut: Array | int
) -> tuple[ActorCarry, Transition, Finished]:
    """Takes `length` steps of one row; an episode that ends is followed by a fresh one.

    The episodes of a trial, where the policy has such, are one to who learns from them: none but
    the last ends, and the successor of a last step is the first observation of the next episode.

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
        transition = transition.replace(truncated=truncated)
        fresh = begin(policy, reset)
        if policy.lasts is not None:
            inside = ended & policy.lasts(carry.history)
            fresh = fresh.replace(history=where(inside, carry.history, fresh.history))
            transition = transition.replace(
                terminated=transition.terminated & ~inside,
                truncated=truncated & ~inside,
                next_observation=jnp.where(inside, reset.observation, transition.next_observation),
            )
        return where(ended, fresh, carry), (transition, finished)

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


def where(this: Array, one: Any, other: Any) -> Any:
    """Returns one of two trees."""
    return jax.tree.map(lambda x, y: jnp.where(this, x, y), one, other)


class Played(NamedTuple):
    """An episode of one row, padded where it ended early."""

    steps: Transition  # [episode_length]
    valid: Array  # [episode_length] bool: which of them belong to the episode
    finished: Finished  # its return
    shown: Any  # [episode_length, ...]


def episode(
    env: Env,
    policy: Policy,
    start: ActorCarry,
    key: Key,
    show: Callable[[ActorCarry], Any] = lambda row: (),
) -> Played:
    """Plays one episode of one row from its start.

    Args:
        env: the family.
        policy: chooses actions.
        start: the row.
        key: for actions.
        show: what else to return, of the row before each step.
    """
    return _episode(env, policy, start, key, show)[1]


def trial(
    env: Env,
    policy: Policy,
    starts: Any,
    key: Key,
    show: Callable[[ActorCarry], Any] = lambda row: (),
) -> Played:
    """Plays the episodes of a trial of one row, one after the other: what is remembered lasts.

    Args:
        env, policy, key, show: as in `episode`.
        starts: [N] states after a reset.

    Returns:
        What `episode` does of each, leaves [N, ...].
    """
    first = begin(policy, jax.tree.map(lambda x: x[0], starts))

    def play(history: Any, at: tuple[Any, Key]) -> tuple[Any, Played]:
        start, key = at
        return _episode(env, policy, first.replace(env_state=start, history=history), key, show)

    keys = jax.random.split(key, len(starts.step))
    return jax.lax.scan(play, first.history, (starts, keys))[1]


def _episode(
    env: Env, policy: Policy, start: ActorCarry, key: Key, show: Callable[[ActorCarry], Any]
) -> tuple[Any, Played]:
    """Returns what is remembered at the end of an episode, and the episode."""

    def step(carry: tuple[ActorCarry, Array], key: Key) -> tuple[tuple[ActorCarry, Array], Played]:
        before, running = carry
        row, transition = act(env, policy, before, key)
        row = row.replace(history=where(running, row.history, before.history))
        ended = running & (transition.terminated | transition.truncated)
        finished = _finished(env, row, ended, env.episode_length)
        return (row, running & ~ended), Played(transition, running, finished, show(before))

    keys = jax.random.split(key, env.episode_length)
    (row, _), played = jax.lax.scan(step, (start, jnp.ones((), bool)), keys)
    finished = jax.tree.map(lambda x: x.sum(0), played.finished)
    return row.history, played._replace(finished=finished)
