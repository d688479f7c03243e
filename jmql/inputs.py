"""What networks see of observations and rewards: one scale, where `network.normalize` is on."""

import jax.numpy as jnp
from flax import struct

from jmql import mesh, replay
from jmql.replay import ReplayState
from jmql.types import Array, Batch, History

_LARGEST = 10.0  # standard deviations


class Moments(struct.PyTreeNode):
    """Mean and variance of something."""

    mean: Array  # [...]
    variance: Array  # [...]


class Scale(struct.PyTreeNode):
    """Of all steps that were collected so far."""

    observation: Moments  # [O]
    reward: Moments  # []
    count: Array  # [] float32: steps


def init(observation_size: int) -> Scale:
    """Returns the scale before the first step, under which all within ±10 stays as it is."""
    observation = Moments(jnp.zeros(observation_size), jnp.ones(observation_size))
    return Scale(observation, Moments(jnp.zeros(()), jnp.ones(())), jnp.zeros(()))


def update(scale: Scale, memory: ReplayState, length: int) -> Scale:
    """Adds the newest steps of every row, by the pairwise rule of Chan, Golub and LeVeque (1979).

    Args:
        scale: before.
        memory: replay with C slots a row, or this device's rows of it.
        length: T, how many steps of a row are new; divides C.
    """
    new = replay.newest(memory, length)
    return Scale(
        added(scale.observation, scale.count, new.observation),
        added(scale.reward, scale.count, new.reward),
        scale.count + new.reward.size * mesh.size(),
    )


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
    """
    if scale is None:
        return observation, history
    return show_observation(scale, observation), history.replace(
        observation=_scaled(scale.observation, history.observation),
        reward=_scaled(scale.reward, history.reward),
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
