"""Held-out tasks: the return before adaptation and after each of its steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmql import rollout, train
from jmql.adapt import NewData, adapt
from jmql.config import Config
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.train import TrainState
from jmql.types import Array, Env, Key, Metrics, Params, Task, Transition

# Folded into a key whose children are those of the next round: any number that is not small.
_EVALUATION = 0x6576616C


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
        `return_pre`, `return_step1` and `return_post`, means over episodes, NaN for an actor
        whose weights are not finite; `blew_up`, how many of these episodes ended because the
        physics was not finite; and the diagnostics of `adapt`. [] each.
    """
    start_key, data_key, adapt_key, episode_key = jax.random.split(key, 4)
    num_data, num_episodes = config.adapt.episodes, config.evaluate.episodes
    training_history = config.network.history_length

    def play(
        actor_params: Params, starts: Any, key: Key, history_length: int
    ) -> tuple[NewData, Array]:
        policy = rollout.greedy(networks, actor_params)

        def one(start: Any, key: Key) -> tuple[Transition, Array, Array]:
            return rollout.episode(env, policy, rollout.begin(env, start, history_length), key)

        keys = jax.random.split(key, jax.tree.leaves(starts)[0].shape[0])
        transitions, valid, blew_up = jax.vmap(one)(starts, keys)
        return NewData(transitions, valid), blew_up.sum()

    # All starts at once, so that the physics of a reset is compiled once.
    keys = jax.random.split(start_key, num_data + num_episodes)
    starts = jax.vmap(env.reset, in_axes=(0, None))(keys, task)
    meta = agent.params["actor"]
    data, _ = play(meta, jax.tree.map(lambda x: x[:num_data], starts), data_key, training_history)
    adapted, metrics = adapt(config, networks, agent, data, memory, adapt_key)

    stages = (meta, adapted.step1.params["actor"], adapted.step2.params["actor"])
    starts = jax.tree.map(lambda x: x[num_data:], starts)

    def mean_return(actor_params: Params) -> tuple[Array, Array]:
        history_length = config.evaluate.history_length or training_history
        played, blew_up = play(actor_params, starts, episode_key, history_length)
        mean = jnp.sum(played.transitions.reward * played.valid) / num_episodes
        # Weights that are not finite end episodes at once, which may look like a good return.
        finite = jnp.isfinite(optax.tree.norm(actor_params))
        return jnp.where(finite, mean, jnp.nan), blew_up

    returns, blew_up = jax.vmap(mean_return)(jax.tree.map(lambda *x: jnp.stack(x), *stages))
    named = dict(zip(("return_pre", "return_step1", "return_post"), returns, strict=True))
    return metrics | named | {"blew_up": blew_up.sum()}


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
    blew_up = per_task["blew_up"].sum()
    per_task = {name: value for name, value in per_task.items() if name != "blew_up"}
    summary = {
        f"{'eval' if name.startswith('return') else 'adapt'}/{name}": value.mean()
        for name, value in per_task.items()
    }
    worst = jnp.sort(per_task["return_post"])[: math.ceil(len(per_task["return_post"]) / 5)]
    return summary | {"eval/return_post_p20": worst.mean(), "eval/blew_up": blew_up}


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
    # The state's key stays as it is: where evaluations fall does not change what is learned.
    evaluate_key = jax.random.fold_in(state.key, _EVALUATION)
    per_task = evaluate(config, env, networks, state.agent, state.memory, held_out, evaluate_key)
    counts = {"env_steps": state.env_steps, "updates": state.agent.updates}
    return state, metrics | summarize(per_task) | counts, per_task
