"""Held-out tasks: the return before adaptation and after each of its steps."""

import math

import jax
import jax.numpy as jnp

from jmql import rollout, train
from jmql.adapt import NewData, adapt
from jmql.config import Config
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.train import TrainState
from jmql.types import Array, Env, Key, Metrics, Params, Task


def evaluate_task(
    config: Config,
    env: Env,
    networks: Networks,
    agent: AgentState,
    memory: ReplayState,
    task: Task,
    key: Key,
) -> Metrics:
    """Collects, adapts and evaluates on one task.

    All three agents play the same number of episodes, from the same starts, with the same kind
    of history.

    Returns:
        `return_pre`, `return_step1` and `return_post`, means over episodes, and the diagnostics
        of `adapt`. [] each.
    """
    data_key, adapt_key, episode_key = jax.random.split(key, 3)
    history_length = config.network.history_length

    def play(actor_params: Params, key: Key, history_length: int) -> NewData:
        policy = rollout.greedy(networks, actor_params)
        return NewData(*rollout.episode(env, policy, task, key, history_length))

    meta = agent.params["actor"]
    data = jax.vmap(lambda key: play(meta, key, history_length))(
        jax.random.split(data_key, config.adapt.episodes)
    )
    adapted, metrics = adapt(config, networks, agent, data, memory, adapt_key)

    stages = (meta, adapted.step1.params["actor"], adapted.step2.params["actor"])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stages)
    keys = jax.random.split(episode_key, config.evaluate.episodes)

    def mean_return(actor_params: Params) -> Array:
        steps = config.evaluate.history_length or history_length
        played = jax.vmap(lambda key: play(actor_params, key, steps))(keys)
        return jnp.sum(played.transitions.reward * played.valid) / len(keys)

    pre, step1, post = jax.vmap(mean_return)(stacked)
    return metrics | {"return_pre": pre, "return_step1": step1, "return_post": post}


def evaluate(
    config: Config,
    env: Env,
    networks: Networks,
    agent: AgentState,
    memory: ReplayState,
    tasks: Task,
    key: Key,
) -> Metrics:
    """Evaluates on K tasks in parallel, leaves of `tasks` [K, ...]. Returns metrics [K]."""
    count = jax.tree.leaves(tasks)[0].shape[0]
    return jax.vmap(
        lambda task, key: evaluate_task(config, env, networks, agent, memory, task, key)
    )(tasks, jax.random.split(key, count))


def summarize(per_task: Metrics) -> Metrics:
    """Reduces the metrics [K] of `evaluate` to the reported ones, [] each."""
    summary = {
        f"{'eval' if name.startswith('return') else 'adapt'}/{name}": value.mean()
        for name, value in per_task.items()
    }
    worst = jnp.sort(per_task["return_post"])[: math.ceil(len(per_task["return_post"]) / 5)]
    return summary | {"eval/return_post_p20": worst.mean()}


def cycle(
    config: Config,
    env: Env,
    networks: Networks,
    held_out: Task,
    state: TrainState,
    rounds: Array,
    warmup: Array,
) -> tuple[TrainState, Metrics, Metrics]:
    """Trains for `rounds` rounds and evaluates on the held-out tasks: the unit that is compiled.

    With `warmup` the rounds fill the replay and the evaluation is that of the untrained agent.

    Args:
        config, env, networks: what is trained.
        held_out: tasks, leaves [K, ...].
        state: before; meant to be donated.
        rounds: [] int32.
        warmup: [] bool.

    Returns:
        The state after, the reported metrics [], and the metrics of every task [K].
    """
    state, metrics = train.epoch(config, env, networks, state, rounds, warmup)
    key, evaluate_key = jax.random.split(state.key)
    state = state.replace(key=key)
    per_task = evaluate(
        config, env, networks, state.agent, state.memory, held_out, evaluate_key
    )
    counts = {"env_steps": state.env_steps, "updates": state.agent.updates}
    return state, metrics | summarize(per_task) | counts, per_task
