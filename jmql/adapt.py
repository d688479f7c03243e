"""Adaptation to one new task (docs/method.md section 2): pure, so vmap over tasks is a batch."""

import dataclasses

import jax
import jax.numpy as jnp

from jmql import inputs, propensity, replay, td3
from jmql.config import Config
from jmql.keys import derive
from jmql.learner import Adapted, NewData
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.types import Array, Batch, Key, Metrics


def adapt(
    config: Config,
    networks: Networks,
    meta: AgentState,
    agent: AgentState,
    data: NewData,
    memory: ReplayState,
    key: Key,
    shot: Array,
) -> tuple[Adapted, Metrics]:
    """Learns from the new data so far and from replay that looks like it: one shot.

    Contexts, and so the importance weights, are those of the meta-trained actor throughout: the
    classifier is applied to the features it was fitted to.

    Args:
        config: the whole configuration.
        networks: the agent's modules.
        meta: the meta-trained agent, also the anchor of the proximal term.
        agent: as adapted so far.
        data: what the agent did on the new task, `adapt.episodes` a shot, those to come not valid.
        memory: replay of the training tasks.
        key: for batches and noise. Tasks that are adapted to side by side should share it: then
            replay is read once for all of them.
        shot: [] int32 from 0. The first begins with the new data alone.

    Returns:
        The adapted agents, and the diagnostics of `propensity.diagnostics` with `prox_coef`, the
        mean lambda of the batches after step 1, [] each, and `reuse` [tasks.train], which share of
        the importance weights of the classifier's draw each training task has, 0 where all are 0.
    """
    classifier, metrics = compare(config, networks, meta, data, memory, derive(key, "classifier"))
    history_length = config.network.history_length
    first = jax.tree.map(lambda x: x[: config.adapt.episodes], data)
    alone = inputs.show_batch(meta.scale, whole(first, history_length))
    size = config.adapt.batch_multiple * config.td3.batch_size
    from_new = round(config.adapt.new_share * size)

    def draw_alone(_: Key) -> tuple[Batch, Array]:
        return alone, jnp.zeros(())

    def draw(key: Key) -> tuple[Batch, Array]:
        parts, coef = [], jnp.float32(config.adapt.prox_coef)
        if from_new:
            parts.append(draw_new(data, derive(key, "new"), from_new, history_length))
        if from_new < size:
            key = derive(key, "replay")
            parts.append(replay.sample_whole(memory, key, size - from_new, history_length))
        parts = [inputs.show_batch(meta.scale, part) for part in parts]
        if from_new < size:
            if config.adapt.reuse == "propensity":
                seen = features(config, networks, meta, parts[-1])
                odds = propensity.log_odds(classifier, seen)
                weight = propensity.importance_weights(config.propensity, odds)
                parts[-1] = parts[-1].replace(weight=weight)
            if config.adapt.prox == "ess":
                coef = coef * (1.0 - propensity.effective_sample_size(parts[-1].weight))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts), coef

    learner = dataclasses.replace(
        config.td3, learning_rate=config.adapt.learning_rate, tau=config.adapt.tau
    )
    num1, num2 = config.adapt.step1_updates, config.adapt.updates
    step1, _ = td3.train(
        learner, networks, agent, derive(key, "step 1"), num1, draw_alone, active=shot == 0
    )
    agent, learned = td3.train(
        learner, networks, step1, derive(key, "step 2"), num2, draw, anchor=meta.params
    )
    return Adapted(step1, agent), metrics | {"prox_coef": td3.means(learned).prox_coef}


def compare(
    config: Config,
    networks: Networks,
    meta: AgentState,
    data: NewData,
    memory: ReplayState,
    key: Key,
) -> tuple[propensity.Classifier, Metrics]:
    """Fits the classifier that tells replay from new data.

    Returns:
        The classifier, and the diagnostics of `propensity.diagnostics` with `reuse`.
    """
    fresh = inputs.show_batch(meta.scale, whole(data, config.network.history_length))
    drawn, past_weight = draw_past(config, memory, data.valid, key)
    new = features(config, networks, meta, fresh)
    past = features(config, networks, meta, inputs.show_batch(meta.scale, drawn))
    classifier = propensity.fit(
        config.propensity,
        jnp.concatenate([new, past]),
        jnp.arange(len(new) + len(past)) >= len(new),
        jnp.concatenate([data.valid.reshape(-1), past_weight]),
    )
    odds = propensity.log_odds(classifier, past)
    metrics = propensity.diagnostics(
        config.propensity, propensity.log_odds(classifier, new), fresh.weight, odds
    )
    by_task = past_weight * propensity.importance_weights(config.propensity, odds)
    by_task = by_task.reshape(-1, config.tasks.train).sum(0)
    total = by_task.sum()
    metrics["reuse"] = jnp.where(total > 0, by_task / jnp.where(total > 0, total, 1.0), 0.0)
    return classifier, metrics


def features(config: Config, networks: Networks, meta: AgentState, batch: Batch) -> Array:
    """Returns what the classifier sees of a batch [N]: [N, features]."""
    context = networks.context(meta.params["actor"], batch.history)
    if not config.propensity.observation:
        return context
    return jnp.concatenate([context, batch.transition.observation], axis=-1)


def draw_new(data: NewData, key: Key, num: int, history_length: int) -> Batch:
    """Draws `num` of the new data's steps, uniformly and with replacement."""
    valid = data.valid.reshape(-1)
    so_far = jnp.cumsum(valid)
    which = jax.random.randint(key, (num,), 1, so_far[-1] + 1)  # 1 is the first valid step
    place = jnp.searchsorted(so_far, which)
    row, slot = jnp.divmod(place, data.valid.shape[1])
    return replay.windows(data.transitions, row, slot, history_length)


def draw_past(config: Config, memory: ReplayState, valid: Array, key: Key) -> tuple[Batch, Array]:
    """Draws the classifier's replay side as the release does, about as large as the new data.

    Each of the n training tasks gives floor(steps of new data / n) + 2 of its recent transitions.

    Args:
        config: the whole configuration.
        memory: replay of the training tasks.
        valid: [N, T] bool, which steps of the new data there are.
        key: for the draw.

    Returns:
        As many transitions as N full episodes ask for, and their weights, 0 for those that fewer
        steps leave out.
    """
    tasks = config.tasks.train
    most = valid.size // tasks + 2
    batch = replay.sample_whole(
        memory,
        key,
        tasks * most,
        config.network.history_length,
        recent=max(1, config.propensity.recent_per_task // (config.collect.rows // tasks)),
        tasks=tasks,
    )
    turn = jnp.arange(tasks * most) // tasks  # of each task's draws
    return batch, 1.0 * (turn < valid.sum() // tasks + 2)


def whole(data: NewData, history_length: int) -> Batch:
    """Returns all new data as one batch [N * T].

    The weight of padding is 0; the rest share a weight such that the mean is 1.
    """
    episodes, length = data.valid.shape
    row = jnp.repeat(jnp.arange(episodes), length)
    slot = jnp.tile(jnp.arange(length), episodes)
    batch = replay.windows(data.transitions, row, slot, history_length)
    valid = data.valid.reshape(-1)
    return batch.replace(weight=valid / valid.mean())
