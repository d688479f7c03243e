"""Adaptation to one new task (docs/method.md section 2): pure, so vmap over tasks is a batch."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jmql import inputs, propensity, replay, td3
from jmql.config import Config
from jmql.keys import derive
from jmql.learner import NewData
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.types import Array, Batch, Key, Metrics


class Adapted(NamedTuple):
    """An agent on its way to a new task. Drop both to roll back."""

    step1: AgentState  # after learning from the new data alone
    step2: AgentState  # and after weighted replay


def adapt(
    config: Config,
    networks: Networks,
    agent: AgentState,
    data: NewData,
    memory: ReplayState,
    key: Key,
) -> tuple[Adapted, Metrics]:
    """Adapts a meta-trained agent to the task that new data came from.

    Contexts, and so the importance weights, are those of the meta-trained actor throughout: the
    classifier is applied to the features it was fitted to.

    Args:
        config: the whole configuration.
        networks: the agent's modules.
        agent: the meta-trained agent, also the anchor of the proximal term.
        data: what the agent did on the new task.
        memory: replay of the training tasks.
        key: for batches and noise. Tasks that are adapted to side by side should share it: then
            replay is read once for all of them.

    Returns:
        The adapted agents, and the diagnostics of `propensity.diagnostics` with `prox_coef`, the
        mean lambda of step 2. [] each.
    """
    history_length = config.network.history_length
    meta = agent.params
    agent = td3.fresh_optimizer(agent)

    def features(batch: Batch) -> Array:
        context = networks.context(meta["actor"], batch.history)
        if not config.propensity.observation:
            return context
        return jnp.concatenate([context, batch.transition.observation], axis=-1)

    fresh = inputs.show_batch(agent.scale, whole(data, history_length))
    new = features(fresh)
    drawn, past_weight = draw_past(config, memory, data.valid, derive(key, "classifier"))
    past = features(inputs.show_batch(agent.scale, drawn))
    classifier = propensity.fit(
        config.propensity,
        jnp.concatenate([new, past]),
        jnp.arange(len(new) + len(past)) >= len(new),
        jnp.concatenate([data.valid.reshape(-1), past_weight]),
    )
    metrics = propensity.diagnostics(
        config.propensity,
        propensity.log_odds(classifier, new),
        fresh.weight,
        propensity.log_odds(classifier, past),
    )

    def draw_new(_: Key) -> tuple[Batch, Array]:
        return fresh, jnp.zeros(())

    def draw_replay(key: Key) -> tuple[Batch, Array]:
        num = config.adapt.batch_multiple * config.td3.batch_size
        batch = replay.sample_whole(memory, key, num, history_length)
        batch = inputs.show_batch(agent.scale, batch)
        if config.adapt.reuse == "propensity":
            odds = propensity.log_odds(classifier, features(batch))
            batch = batch.replace(weight=propensity.importance_weights(config.propensity, odds))
        coef = jnp.float32(config.adapt.prox_coef)
        if config.adapt.prox == "ess":
            coef = coef * (1.0 - propensity.effective_sample_size(batch.weight))
        return batch, coef

    learner = dataclasses.replace(config.td3, learning_rate=config.adapt.learning_rate)
    num1, num2 = config.adapt.step1_updates, config.adapt.step2_updates
    step1, _ = td3.train(learner, networks, agent, derive(key, "step 1"), num1, draw_new)
    step2, learned = td3.train(
        learner, networks, step1, derive(key, "step 2"), num2, draw_replay, anchor=meta
    )
    return Adapted(step1, step2), metrics | {"prox_coef": td3.means(learned).prox_coef}


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
