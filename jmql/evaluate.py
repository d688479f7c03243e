"""Held-out tasks: the return before adaptation and after each of its steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmql import rollout, train
from jmql.adapt import NewData, adapt
from jmql.config import Config
from jmql.keys import derive
from jmql.networks import Networks
from jmql.replay import ReplayState
from jmql.td3 import AgentState
from jmql.train import TrainState
from jmql.types import Array, Env, Key, Metrics, Params, Task, Transition


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
        `return_pre`, `return_step1` and `return_post`, means over episodes; `failed`, whether
        adaptation ended in weights that are not finite, whose return is the worst there can be;
        `blew_up`, how many of the other episodes ended because the physics was not finite; and
        the diagnostics of `adapt`. [] each.
    """
    num_data, num_episodes = config.adapt.episodes, config.evaluate.episodes
    most = max(num_data, num_episodes)
    training_history = config.network.history_length
    histories = (training_history, config.evaluate.history_length or training_history)

    def play(actor_params: Params, starts: Any, reach: Array) -> tuple[NewData, Metrics]:
        """Returns episodes from `starts` [most], and what the ones that count have earned."""
        policy = rollout.greedy(networks, actor_params, reach)

        def one(start: Any, key: Key) -> tuple[Transition, Array, rollout.Finished]:
            return rollout.episode(env, policy, rollout.begin(env, start, max(histories)), key)

        keys = jax.random.split(derive(key, "episodes"), most)
        transitions, valid, finished = jax.vmap(one)(starts, keys)
        finished = jax.tree.map(lambda x: x[:num_episodes].sum(), finished)
        failed = ~jnp.isfinite(optax.tree.norm(actor_params))
        worst = env.worst_reward * env.episode_length
        return NewData(transitions, valid), {
            "return": jnp.where(failed, worst, finished.return_sum / num_episodes),
            "failed": failed,
            "blew_up": jnp.where(failed, 0, finished.blew_up),
        }

    @jax.jit  # traced once, although `skip` asks for its shapes too
    def learn(data: NewData) -> tuple[Params, Metrics]:
        """Returns the two adapted actors, stacked, and the metrics of `adapt`."""
        data = jax.tree.map(lambda x: x[:num_data], data)
        adapt_key = derive(key, "adaptation")
        adapted, metrics = adapt(config, networks, agent, data, memory, adapt_key)
        return _stack(adapted.step1.params["actor"], adapted.step2.params["actor"]), metrics

    def skip(data: NewData) -> tuple[Params, Metrics]:
        """Returns zeros in the place of what `learn` returns."""
        return _zeros(jax.eval_shape(learn, data))

    def turn(actors: Params, inputs: tuple[Array, Array]) -> tuple[Params, Any]:
        first, kind = inputs
        of_kind = jax.tree.map(lambda x: x[kind], (starts, jnp.array(histories)))
        played, earned = jax.vmap(play)(actors, *of_kind)
        adapted, metrics = jax.lax.cond(first, learn, skip, jax.tree.map(lambda x: x[0], played))
        return adapted, (earned, metrics)

    # Starts are of two kinds: 0 for data, 1 for evaluation.
    keys = jnp.stack([jax.random.split(derive(key, kind), most) for kind in ("data", "starts")])
    starts = jax.vmap(jax.vmap(env.reset, in_axes=(0, None)), in_axes=(0, None))(keys, task)
    # Two actors play at a time, in two turns of a loop so that physics is compiled once: first the
    # meta-trained one for data and to be evaluated, then the two adapted ones.
    meta = agent.params["actor"]
    inputs = (jnp.array([True, False]), jnp.array([[0, 1], [1, 1]]))  # [turn], [turn, actor]
    _, (earned, metrics) = jax.lax.scan(turn, _stack(meta, meta), inputs)
    metrics = jax.tree.map(lambda x: x[0], metrics)
    pre, step1, post = jax.tree.map(lambda x: x.reshape(-1)[1:], earned["return"])
    return metrics | {
        "return_pre": pre,
        "return_step1": step1,
        "return_post": post,
        "failed": earned["failed"][1].any(),
        "blew_up": earned["blew_up"].reshape(-1)[1:].sum(),
    }


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


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
    """Reduces the metrics [K] of `evaluate` to the reported ones, [] each.

    Returns are means over all tasks; a diagnostic is the mean over the tasks that have it, NaN
    where none has.
    """
    counts = {"eval/blew_up": "blew_up", "adapt/failed": "failed"}
    summary = {name: per_task[task_name].sum() for name, task_name in counts.items()}
    for name, value in per_task.items():
        if name.startswith("return"):
            summary[f"eval/{name}"] = value.mean()
        elif name not in counts.values():
            summary[f"adapt/{name}"] = jnp.nanmean(jnp.where(jnp.isfinite(value), value, jnp.nan))
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
    measured: Array,
    updates: Array,
) -> tuple[TrainState, Metrics, Metrics]:
    """Trains for `rounds` rounds and evaluates on the held-out tasks: the unit that is compiled.

    With `warmup` the rounds fill the replay and the evaluation is that of the untrained agent.

    Args:
        config, env, networks: what is trained.
        held_out: tasks, leaves [K, ...].
        state: before; meant to be donated.
        rounds: [] int32.
        warmup: [] bool.
        measured: [] bool. False: there is no evaluation, and what would come of it is zeros.
        updates: [] int32, critic steps so far, see `train.round`.

    Returns:
        The state after, the reported metrics [], and the metrics of every task [K].
    """
    state, metrics = train.epoch(config, env, networks, state, rounds, warmup, updates)
    # The state's key stays as it is: where evaluations fall does not change what is learned.
    key = derive(state.key, "evaluation")

    @jax.jit  # traced once, although its shapes are asked for too
    def measure(state: TrainState) -> Metrics:
        return evaluate(config, env, networks, state.agent, state.memory, held_out, key)

    def skip(state: TrainState) -> Metrics:
        return _zeros(jax.eval_shape(measure, state))

    per_task = jax.lax.cond(measured, measure, skip, state)
    counts = {"rounds": state.rounds, "updates": state.agent.updates}
    return state, metrics | summarize(per_task) | counts, per_task
