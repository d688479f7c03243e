"""Held-out tasks: the return before adaptation and after each of its stages."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmql import mesh, rollout
from jmql.config import Config
from jmql.keys import derive
from jmql.learner import Learner, NewData
from jmql.replay import ReplayState
from jmql.types import Actor, Array, Env, Key, Metrics, Task


class Games(NamedTuple):
    """What actors play from: the starts of their episodes, and how far back they see."""

    starts: Any  # [N] states after a reset
    reach: Array  # [] int32 steps


class Earned(NamedTuple):
    """What an actor earned, [] each."""

    means: Metrics  # over episodes: `return` and what else the environment reports
    failed: Array  # bool: something of it is not finite
    blew_up: Array  # episodes that ended because the physics was not finite


def play(
    config: Config, env: Env, learner: Learner, actor: Actor, games: Games, key: Key
) -> tuple[NewData, Earned]:
    """Plays an episode from each of N starts.

    Returns:
        All episodes [N], and what the first `evaluate.episodes` of them earned. The return of
        weights that are not finite is the worst there can be.
    """
    policy = learner.greedy(actor, games.reach)
    history_length = max(config.network.history_length, config.evaluate.history_length)

    def one(start: Any, key: Key) -> Any:
        return rollout.episode(env, policy, rollout.begin(env, start, history_length), key)

    keys = jax.random.split(key, len(games.starts.step))
    transitions, valid, finished = jax.vmap(one)(games.starts, keys)
    counted = jax.tree.map(lambda x: x[: config.evaluate.episodes].sum(), finished)
    failed = ~jnp.isfinite(optax.tree.norm(actor))
    worst = jax.tree.map(jnp.zeros_like, rollout.means(counted))
    worst |= {"return": jnp.float32(env.worst_reward * env.episode_length)}
    means = jax.tree.map(lambda x, y: jnp.where(failed, x, y), worst, rollout.means(counted))
    blew_up = jnp.where(failed, 0, counted.blew_up)
    return NewData(transitions, valid), Earned(means, failed, blew_up)


def evaluate_task(
    config: Config,
    env: Env,
    learner: Learner,
    agent: Any,
    memory: ReplayState,
    task: Task,
    key: Key,
    draws: Key,
) -> Metrics:
    """Collects, adapts and evaluates on one task, under a key for its episodes and one for the
    draws of adaptation.

    All actors play the same number of episodes, from the same starts, with the same kind of
    history.

    Returns:
        For `pre` and each stage of the learner `return_*`, and likewise what else the environment
        reports, means over episodes; `failed`, whether adaptation ended in weights that are not
        finite; `blew_up`, how many of the other episodes ended because the physics was not finite;
        and the diagnostics of adaptation. [] each.
    """
    stages, most = learner.stages, max(config.adapt.episodes, config.evaluate.episodes)

    def play_one(actor: Actor, games: Games) -> tuple[NewData, Earned]:
        return play(config, env, learner, actor, games, derive(key, "episodes"))

    @jax.jit  # traced once, although `skip` asks for its shapes too
    def learn(actors: Actor, data: NewData) -> tuple[Actor, Metrics]:
        """Returns the actors with those of the later turns adapted, and the diagnostics."""
        data = jax.tree.map(lambda x: x[: config.adapt.episodes], data)
        assert learner.adapt is not None
        adapted, diagnostics = learner.adapt(agent, data, memory, draws)
        # Where the last turn has a place too many, the last stage plays twice.
        stage = jnp.arange(plan[1:].size).clip(max=len(stages) - 1).reshape(plan[1:].shape)
        return jax.tree.map(lambda x, new: x.at[1:].set(new[stage]), actors, adapted), diagnostics

    def skip(actors: Actor, data: NewData) -> tuple[Actor, Metrics]:
        return actors, zeros(jax.eval_shape(learn, actors, data)[1])

    def turn(actors: Actor, now: tuple[Array, Array]) -> tuple[Actor, tuple[Earned, Metrics]]:
        index, kind = now
        now_playing = jax.tree.map(lambda x: x[index], actors)
        data, earned = jax.vmap(play_one)(now_playing, jax.tree.map(lambda x: x[kind], kinds))
        if not stages:
            return actors, (earned, {})
        data = jax.tree.map(lambda x: x[0], data)
        actors, diagnostics = jax.lax.cond(index == 0, learn, skip, actors, data)
        return actors, (earned, diagnostics)

    # Games are of two kinds: 0 for data, 1 for evaluation.
    keys = jnp.stack([jax.random.split(derive(key, kind), most) for kind in ("data", "starts")])
    starts = jax.vmap(jax.vmap(env.reset, in_axes=(0, None)), in_axes=(0, None))(keys, task)
    trained = config.network.history_length
    kinds = Games(starts, jnp.array([trained, config.evaluate.history_length or trained]))
    # Two actors play at a time, in turns of a loop so that physics is compiled once: first the
    # meta-trained one for data and to be evaluated, then those of the stages.
    plan = jnp.array([[0, 1], *[[1, 1]] * math.ceil(len(stages) / 2)])  # [turn, actor]
    actors = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (*plan.shape, *x.shape)), learner.actor(agent)
    )
    _, (earned, diagnostics) = jax.lax.scan(turn, actors, (jnp.arange(len(plan)), plan))
    earned = jax.tree.map(lambda x: x.reshape(-1)[1 : 2 + len(stages)], earned)
    metrics = jax.tree.map(lambda x: x[0], diagnostics)
    for name, values in earned.means.items():
        metrics |= {f"{name}_{stage}": values[i] for i, stage in enumerate(("pre", *stages))}
    failed, blew_up = earned.failed[1:].any(), earned.blew_up.sum()
    return metrics | {"failed": failed, "blew_up": blew_up}


def evaluate(
    config: Config,
    env: Env,
    learner: Learner,
    agent: Any,
    memory: ReplayState,
    tasks: Task,
    key: Key,
) -> Metrics:
    """Evaluates on K tasks in parallel, leaves of `tasks` [K, ...]. Returns metrics [K].

    All adapt with the same draws of replay, which is read once for all of them.
    """
    count, draws = len(jax.tree.leaves(tasks)[0]), derive(key, "adaptation")
    # Where devices share the tasks, each has the same number: some are done twice.
    places = jnp.arange(-(-count // mesh.size()) * mesh.size()) % count
    keys = jax.random.split(derive(key, "tasks"), count)
    mine, keys = mesh.share(jax.tree.map(lambda x: x[places], (tasks, keys)))

    def one(task: Task, key: Key) -> Metrics:
        return evaluate_task(config, env, learner, agent, memory, task, key, draws)

    per_task = mesh.gather(jax.vmap(one)(mine, keys))
    return jax.tree.map(lambda x: x[:count], per_task)


def summarize(learner: Learner, per_task: Metrics) -> Metrics:
    """Reduces the metrics [K] of `evaluate` to the reported ones, [] each.

    What was earned are means over all tasks; a diagnostic is the mean over the tasks that have it,
    NaN where none has. `eval/return_*_p20` is the worst fifth after the last stage.
    """
    names = ("pre", *learner.stages)
    summary = {"eval/blew_up": per_task["blew_up"].sum(), "adapt/failed": per_task["failed"].sum()}
    for name, value in per_task.items():
        if name.rpartition("_")[2] in names:
            summary[f"eval/{name}"] = value.mean()
        elif name not in ("blew_up", "failed"):
            summary[f"adapt/{name}"] = jnp.nanmean(jnp.where(jnp.isfinite(value), value, jnp.nan))
    last = f"return_{names[-1]}"
    worst = jnp.sort(per_task[last])[: math.ceil(len(per_task[last]) / 5)]
    return summary | {f"eval/{last}_p20": worst.mean()}


def zeros(shapes: Any) -> Any:
    """Returns arrays of zeros of given shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
