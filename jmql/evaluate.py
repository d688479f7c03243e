"""Held-out tasks: the return before adaptation and after each of its stages."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jmql import mesh, rollout
from jmql.config import Config
from jmql.keys import derive
from jmql.learner import Learner, NewData
from jmql.replay import ReplayState
from jmql.rollout import Finished
from jmql.types import Actor, Array, Env, Key, Metrics, Task

AT_ONCE = 64  # tasks that a device adapts to side by side


class Games(NamedTuple):
    """How actors play: from which starts, under which key, how far back they see, what noise."""

    starts: Any  # [N] states after a reset
    key: Key  # []
    reach: Array  # [] int32 steps
    noise: Array  # [] standard deviation of the noise of actions


class Earned(NamedTuple):
    """What an actor earned, [] each."""

    means: Metrics  # over episodes: `return` and what else the environment reports
    failed: Array  # bool: something of it is not finite
    blew_up: Array  # episodes that ended because the physics was not finite


def play(
    config: Config, env: Env, learner: Learner, actor: Actor, games: Games
) -> tuple[NewData, Earned]:
    """Plays an episode from each of N starts.

    Returns:
        All episodes [N], and what the first `evaluate.episodes` of them earned. The return of
        weights that are not finite is the worst there can be.
    """
    policy = learner.greedy(actor, games.reach, games.noise)

    def one(start: Any, key: Key) -> rollout.Played:
        return rollout.episode(env, policy, rollout.begin(policy, start), key)

    keys = jax.random.split(games.key, len(games.starts.step))
    played = jax.vmap(one)(games.starts, keys)
    counted = jax.tree.map(lambda x: x[: config.evaluate.episodes].sum(), played.finished)
    return NewData(played.steps, played.valid), earned(env, actor, counted)


def earned(env: Env, actor: Actor, finished: Finished) -> Earned:
    """Returns what an actor earned in episodes, whose sums are given, [] each."""
    failed = ~jnp.isfinite(optax.tree.norm(actor))
    worst = jax.tree.map(jnp.zeros_like, rollout.means(finished))
    worst |= {"return": jnp.float32(env.worst_reward * env.episode_length)}
    means = jax.tree.map(lambda x, y: jnp.where(failed, x, y), worst, rollout.means(finished))
    return Earned(means, failed, jnp.where(failed, 0, finished.blew_up))


def trials(
    config: Config, env: Env, learner: Learner, actor: Actor, task: Task, key: Key
) -> Metrics:
    """Plays `evaluate.episodes` trials of a task, of an episode for each stage and one before.

    Returns:
        As `evaluate_task`: `return_pre` is that of first episodes.
    """
    policy = learner.greedy(actor, jnp.int32(config.network.history_length), 0.0)
    names, count = ("pre", *learner.stages), config.evaluate.episodes
    keys = jax.random.split(derive(key, "starts"), (count, len(names)))
    starts = jax.vmap(jax.vmap(env.reset, in_axes=(0, None)), in_axes=(0, None))(keys, task)

    def one(starts: Any, key: Key) -> Finished:
        return rollout.trial(env, policy, starts, key).finished

    finished = jax.vmap(one)(starts, jax.random.split(derive(key, "episodes"), count))
    found = jax.vmap(functools.partial(earned, env, actor))(
        jax.tree.map(lambda x: x.sum(0), finished)
    )
    failed, blew_up = found.failed.any(), found.blew_up.sum()
    return by_stage(found.means, names) | {"failed": failed, "blew_up": blew_up}


def evaluate_task(
    config: Config,
    env: Env,
    learner: Learner,
    agent: Any,
    memory: ReplayState,
    task: Task,
    key: Key,
    draws: Key,
    given: NewData | None = None,
) -> tuple[Metrics, NewData | None, Actor]:
    """Collects, adapts and evaluates on one task, shot after shot, under a key for its episodes
    and one for the draws of adaptation. A learner that does not adapt plays `trials`.

    All actors play the same number of episodes, from the same starts, with the same kind of
    history; the data of each shot have starts of their own. Or the data of all shots are `given`.

    Returns:
        For `pre` and each stage of the learner `return_*`, and likewise what else the environment
        reports, means over episodes; `failed`, whether adaptation ended in weights that are not
        finite; `blew_up`, how many of these episodes ended because the physics was not finite,
        [] each; and the diagnostics of the last shot. Beside them the data of all shots,
        [shots * adapt.episodes], and what acts after the last.
    """
    stages, adapt, begin = learner.stages, learner.adapt, learner.begin
    if adapt is None or begin is None:
        actor = learner.actor(agent)
        return trials(config, env, learner, actor, task, key), None, actor
    shots, episodes = len(stages) - 1, config.adapt.episodes
    kinds = games_of(config, env, task, key, shots)
    Carry = tuple[Any, Actor, NewData]  # the agent so far, what acted after step 1, all new data

    def play_one(actor: Actor, games: Games) -> tuple[NewData, Earned]:
        return play(config, env, learner, actor, games)

    @jax.jit  # traced once, although `skip` asks for its shapes too
    def learn(carry: Carry, played: NewData, shot: Array) -> tuple[Carry, Metrics]:
        so_far, halfway, data = carry
        first = shot * episodes
        if given is not None:
            played = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, episodes), given)
        data = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new[:episodes], first, axis=0),
            data,
            played,
        )
        draw = jax.random.fold_in(draws, shot)
        adapted, diagnostics = adapt(agent, so_far, data, memory, draw, shot)
        halfway = rollout.where(shot == 0, learner.actor(adapted.step1), halfway)
        return (adapted.agent, halfway, data), diagnostics

    def skip(carry: Carry, played: NewData, shot: Array) -> tuple[Carry, Metrics]:
        return carry, zeros(jax.eval_shape(learn, carry, played, shot)[1])

    def turn(carry: Carry, index: Array) -> tuple[Carry, tuple[Earned, Metrics]]:
        """Two actors play at a time, so that physics is compiled once: the agent as adapted so far
        for data and to be evaluated, and after the last shot that of step 1 and the last.
        """
        actor = learner.actor(carry[0])
        actors = jax.tree.map(
            lambda x, y: jnp.stack([x, y]), rollout.where(index < shots, actor, carry[1]), actor
        )
        games = jax.tree.map(lambda x: x[jnp.stack([index, jnp.int32(shots)])], kinds)
        played, found = jax.vmap(play_one)(actors, games)
        played = jax.tree.map(lambda x: x[0], played)
        carry, diagnostics = lax.cond(index < shots, learn, skip, carry, played, index)
        return carry, (found, diagnostics)

    nothing = no_data(config, env, learner, agent, memory, kinds)
    carry = (begin(agent), learner.actor(agent), nothing)
    (adapted, _, data), (found, diagnostics) = lax.scan(turn, carry, jnp.arange(shots + 1))
    # [turn, actor]: before, after step 1, after each shot.
    found = jax.tree.map(lambda x: jnp.concatenate([x[:1, 1], x[-1:, 0], x[1:, 1]]), found)
    metrics = jax.tree.map(lambda x: x[shots - 1], diagnostics)
    metrics |= by_stage(found.means, ("pre", *stages))
    metrics |= {"failed": found.failed[1:].any(), "blew_up": found.blew_up.sum()}
    return metrics, data, learner.actor(adapted)


def by_stage(means: Metrics, names: Sequence[str]) -> Metrics:
    """Returns what was earned at each stage, leaves [stages], as metrics [], `return_pre` first."""
    return {f"{what}_{name}": x[i] for what, x in means.items() for i, name in enumerate(names)}


def games_of(config: Config, env: Env, task: Task, key: Key, shots: int) -> Games:
    """Returns the games [shots + 1] on a task: those for the data of each shot, and for
    evaluation.
    """
    most = max(config.adapt.episodes, config.evaluate.episodes)
    keys = jnp.concatenate(
        [
            jax.random.split(derive(key, "data"), (shots, most)),
            jax.random.split(derive(key, "starts"), (1, most)),
        ]
    )
    starts = jax.vmap(jax.vmap(env.reset, in_axes=(0, None)), in_axes=(0, None))(keys, task)
    reach = jnp.full(shots + 1, config.network.history_length)
    if config.evaluate.history_length:
        reach = reach.at[-1].set(config.evaluate.history_length)
    noise = jnp.full(shots + 1, config.adapt.exploration_noise).at[-1].set(0.0)
    return Games(starts, jax.random.split(derive(key, "episodes"), shots + 1), reach, noise)


def no_data(
    config: Config, env: Env, learner: Learner, agent: Any, memory: ReplayState, games: Games
) -> NewData:
    """Returns room for the data of all games but those for evaluation, not valid yet."""
    first: Games = jax.tree.map(lambda x: x[0], games)
    start = jax.tree.map(lambda x: x[0], first.starts)
    policy = learner.greedy(learner.actor(agent), first.reach, first.noise)
    seen = start.observation
    _, behaviour = jax.eval_shape(policy.act, seen, policy.start(seen), first.key)
    of_step = jax.tree.map(lambda x: x[0, 0], memory.data).replace(behaviour=behaviour)
    lead = ((len(games.reach) - 1) * config.adapt.episodes, env.episode_length)
    return NewData(
        jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), of_step),
        jnp.zeros(lead, bool),
    )


def evaluate(
    config: Config,
    env: Env,
    learner: Learner,
    agent: Any,
    memory: ReplayState,
    tasks: Task,
    key: Key,
    given: NewData | None = None,
) -> tuple[Metrics, NewData | None]:
    """Evaluates on K tasks in parallel, leaves of `tasks` [K, ...], with the data that each
    collects, or that are given of each. Returns metrics [K], and the data [K, ...].

    A device does up to `AT_ONCE` at a time, for each has an agent and episodes in memory. All
    adapt with the same draws of replay, which is read once for those side by side.
    """
    count, draws = len(jax.tree.leaves(tasks)[0]), derive(key, "adaptation")
    # Each device has as many tasks, and each time as many: some are done twice.
    times = -(-count // (mesh.size() * AT_ONCE))
    at_once = -(-count // (mesh.size() * times))
    places = jnp.arange(mesh.size() * times * at_once) % count
    keys = jax.random.split(derive(key, "tasks"), count)
    mine = mesh.share(jax.tree.map(lambda x: x[places], (tasks, keys, given)))
    mine = jax.tree.map(lambda x: x.reshape(times, at_once, *x.shape[1:]), mine)

    def one(task: Task, key: Key, given: NewData | None) -> tuple[Metrics, NewData | None]:
        return evaluate_task(config, env, learner, agent, memory, task, key, draws, given)[:2]

    found = lax.map(lambda part: jax.vmap(one)(*part), mine)
    found = mesh.gather(jax.tree.map(lambda x: x.reshape(times * at_once, *x.shape[2:]), found))
    return jax.tree.map(lambda x: x[:count], found)


def summarize(learner: Learner, per_task: Metrics) -> Metrics:
    """Reduces the metrics [K] of `evaluate` to the reported ones, [] each, all but the map `reuse`.

    What was earned are means over all tasks; a diagnostic is the mean over the tasks that have it,
    NaN where none has. `eval/return_*_p20` is the worst fifth after the last stage.
    """
    names = ("pre", *learner.stages)
    summary = {"eval/blew_up": per_task["blew_up"].sum(), "adapt/failed": per_task["failed"].sum()}
    for name, value in per_task.items():
        if name.rpartition("_")[2] in names:
            summary[f"eval/{name}"] = value.mean()
        elif name not in ("blew_up", "failed", "reuse"):
            summary[f"adapt/{name}"] = jnp.nanmean(jnp.where(jnp.isfinite(value), value, jnp.nan))
    last = f"return_{names[-1]}"
    worst = jnp.sort(per_task[last])[: math.ceil(len(per_task[last]) / 5)]
    return summary | {f"eval/{last}_p20": worst.mean()}


def zeros(shapes: Any) -> Any:
    """Returns arrays of zeros of given shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
