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
    start_key, adapt_key, episode_key = jax.random.split(key, 3)
    num_data, num_episodes = config.adapt.episodes, config.evaluate.episodes
    most = max(num_data, num_episodes)
    training_history = config.network.history_length
    histories = (training_history, config.evaluate.history_length or training_history)

    def play(actor_params: Params, starts: Any, reach: Array) -> tuple[NewData, Array, Array]:
        """Returns episodes from `starts` [most]; of those that count, mean return and blow-ups."""
        policy = rollout.greedy(networks, actor_params, reach)

        def one(start: Any, key: Key) -> tuple[Transition, Array, Array]:
            return rollout.episode(env, policy, rollout.begin(env, start, max(histories)), key)

        transitions, valid, blew_up = jax.vmap(one)(starts, jax.random.split(episode_key, most))
        mean = jnp.sum((transitions.reward * valid)[:num_episodes]) / num_episodes
        # Weights that are not finite end episodes at once, which may look like a good return.
        mean = jnp.where(jnp.isfinite(optax.tree.norm(actor_params)), mean, jnp.nan)
        return NewData(transitions, valid), mean, blew_up[:num_episodes].sum()

    @jax.jit  # traced once, although `skip` asks for its shapes too
    def learn(data: NewData) -> tuple[Params, Metrics]:
        """Returns the two adapted actors, stacked, and the metrics of `adapt`."""
        data = jax.tree.map(lambda x: x[:num_data], data)
        adapted, metrics = adapt(config, networks, agent, data, memory, adapt_key)
        return _stack(adapted.step1.params["actor"], adapted.step2.params["actor"]), metrics

    def skip(data: NewData) -> tuple[Params, Metrics]:
        """Returns zeros in the place of what `learn` returns."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, data))

    def turn(actors: Params, inputs: tuple[Array, Array]) -> tuple[Params, Any]:
        first, kind = inputs
        of_kind = jax.tree.map(lambda x: x[kind], (starts, jnp.array(histories)))
        played, returns, blew_up = jax.vmap(play)(actors, *of_kind)
        adapted, metrics = jax.lax.cond(first, learn, skip, jax.tree.map(lambda x: x[0], played))
        return adapted, (returns, blew_up, metrics)

    # Starts are of two kinds: 0 for data, 1 for evaluation.
    keys = jax.vmap(lambda key: jax.random.split(key, most))(jax.random.split(start_key))
    starts = jax.vmap(jax.vmap(env.reset, in_axes=(0, None)), in_axes=(0, None))(keys, task)
    # Two actors play at a time, in two turns of a loop so that physics is compiled once: first the
    # meta-trained one for data and to be evaluated, then the two adapted ones.
    meta = agent.params["actor"]
    inputs = (jnp.array([True, False]), jnp.array([[0, 1], [1, 1]]))  # [turn], [turn, actor]
    _, (returns, blew_up, metrics) = jax.lax.scan(turn, _stack(meta, meta), inputs)
    metrics = jax.tree.map(lambda x: x[0], metrics)
    names = ("return_pre", "return_step1", "return_post")
    named = dict(zip(names, returns.reshape(-1)[1:], strict=True))
    return metrics | named | {"blew_up": blew_up.reshape(-1)[1:].sum()}


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


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
