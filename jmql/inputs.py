"""What networks see of observations and rewards: one scale, where `network.normalize` is on."""

from typing import ClassVar

import jax.numpy as jnp
from flax import struct

from jmql import mesh, replay
from jmql.replay import ReplayState
from jmql.types import Array, Batch, History, Transition

_LARGEST = 10.0  # standard deviations


class Moments(struct.PyTreeNode):
    """Mean and variance of something."""

    mean: Array  # [...]
    variance: Array  # [...]


class Changes(struct.PyTreeNode):
    """Mean squares of all changes from a step of an episode to the next, within rounds."""

    observation: Array  # [O]
    reward: Array  # []
    count: Array  # [] float32: changes


class Scale(struct.PyTreeNode):
    """Of all steps that were collected so far."""

    observation: Moments  # [O]
    reward: Moments  # []
    count: Array  # [] float32: steps
    changes: ClassVar[Changes | None] = None  # histories do not show them


class ChangesScale(Scale):
    """One under which histories show changes. Apart, for a field changes checkpoints."""

    changes: Changes  # type: ignore[misc]  # of each scale, where the class above has none for all


def init(observation_size: int, changes: bool = False) -> Scale:
    """Returns the scale before the first step, under which all within ±10 stays as it is.

    Args:
        observation_size: O.
        changes: whether histories show how they change from step to step.
    """
    observation = Moments(jnp.zeros(observation_size), jnp.ones(observation_size))
    none = observation, Moments(jnp.zeros(()), jnp.ones(())), jnp.zeros(())
    if not changes:
        return Scale(*none)
    return ChangesScale(*none, Changes(jnp.ones(observation_size), jnp.ones(()), jnp.zeros(())))


def update(scale: Scale, memory: ReplayState, length: int) -> Scale:
    """Adds the newest steps of every row, by the pairwise rule of Chan, Golub and LeVeque (1979).

    Args:
        scale: before.
        memory: replay with C slots a row, or this device's rows of it.
        length: T, how many steps of a row are new; divides C.
    """
    new = replay.newest(memory, length)
    if scale.changes is not None:
        scale = scale.replace(changes=_counted(scale.changes, new))
    return scale.replace(
        observation=added(scale.observation, scale.count, new.observation),
        reward=added(scale.reward, scale.count, new.reward),
        count=scale.count + new.reward.size * mesh.size(),
    )


def _counted(changes: Changes, new: Transition) -> Changes:
    """Adds those of new steps [E, T]."""
    same = new.step[:, 1:] > 0
    squares = [
        jnp.square(_changed(x, same)).sum((0, 1)) for x in (new.observation, new.reward[..., None])
    ]
    observation, reward = mesh.total(squares)
    number = mesh.total(same.sum(dtype=jnp.float32))
    count = changes.count + number
    share = 1.0 / jnp.maximum(1.0, count)
    return Changes(
        changes.observation + share * (observation - number * changes.observation),
        changes.reward + share * (reward[0] - number * changes.reward),
        count,
    )


def _changed(x: Array, same: Array) -> Array:
    """Returns how x [..., T, I] changes from step to step [..., T - 1, I], 0 where these are not of
    the `same` episode [..., T - 1].
    """
    return jnp.where(same[..., None], x[..., 1:, :] - x[..., :-1, :], 0.0)


def added(before: Moments, count: Array, x: Array) -> Moments:
    """Returns moments of `count` [] values, and of this device's share of more, x [E, T, ...]."""
    new = x.shape[0] * x.shape[1] * mesh.size()
    share = new / (count + new)
    mean = mesh.mean(x.mean((0, 1)))
    variance = mesh.mean(jnp.square(x - mean[None, None]).mean((0, 1)))
    change = mean - before.mean
    return Moments(
        before.mean + share * change,
        before.variance + share * (variance - before.variance + (1 - share) * jnp.square(change)),
    )


def show(scale: Scale | None, observation: Array, history: History) -> tuple[Array, History]:
    """Returns what networks see; all as it is where there is no scale.

    Args:
        scale: of what was collected.
        observation: [..., O].
        history: [..., H].

    Returns:
        Observation and history. Where it shows changes, its observations [..., H, 2 O + 1] end with
        those of observation and reward since the step before, over their root mean squares; the
        first of a history is 0.
    """
    if scale is None:
        return observation, history
    seen = _scaled(scale.observation, history.observation)
    if scale.changes is not None:
        both = history.mask[..., 1:] & history.mask[..., :-1]
        for x, square in (
            (history.observation, scale.changes.observation),
            (history.reward[..., None], scale.changes.reward[None]),
        ):
            change = jnp.concatenate([jnp.zeros_like(x[..., :1, :]), _changed(x, both)], axis=-2)
            change = _scaled(Moments(jnp.zeros_like(square), square), change)
            seen = jnp.concatenate([seen, change], axis=-1)
    return show_observation(scale, observation), history.replace(
        observation=seen, reward=_scaled(scale.reward, history.reward)
    )


def show_observation(scale: Scale | None, observation: Array) -> Array:
    """Returns what networks see of observations [..., O]."""
    return observation if scale is None else _scaled(scale.observation, observation)


def show_batch(scale: Scale | None, batch: Batch) -> Batch:
    """Returns transitions [...] as networks see them; what was earned stays as it is."""
    step = batch.transition
    observation, history = show(scale, step.observation, batch.history)
    next_observation, next_history = show(scale, step.next_observation, batch.next_history)
    step = step.replace(observation=observation, next_observation=next_observation)
    return batch.replace(transition=step, history=history, next_history=next_history)


def _scaled(moments: Moments, x: Array) -> Array:
    """Returns how many deviations from the mean x [..., *] is, of moments [*]."""
    lead = range(x.ndim - moments.mean.ndim)
    mean, variance = (jnp.expand_dims(y, lead) for y in (moments.mean, moments.variance))
    return jnp.clip((x - mean) / jnp.sqrt(variance + 1e-8), -_LARGEST, _LARGEST)
