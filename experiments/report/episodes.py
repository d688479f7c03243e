"""Plays held-out tasks before and after adaptation, or first and last in a trial, for a page."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run
from experiments.program import Program
from experiments.report.source import EPISODES
from experiments.terminal import called, task_names
from jmql import evaluate, rollout
from jmql.keys import derive
from jmql.rollout import ActorCarry
from jmql.settings import ConfigError
from jmql.train import TrainState
from jmql.types import Actor, Array, Key, Policy, Task

_TASKS, _BODIES = 8, 4  # played, at the most: of points, and of bodies, which take longer
_FRAMES = 100  # of an episode, at the most, of which the body is kept


def record(folder: Path) -> None:
    """Writes episodes.npz: the first seed of a run on some of its held-out tasks, one episode
    before and one after adaptation, from the same start; or, where there is no adaptation, the
    first and the last of a trial.

    Leaves are [K, N, T, ...] of tasks, of these episodes, which are called `sides`, and of steps:
    `alive`, `reward`, `context` [Z], `place` [2] (m), where a family has one, and of every
    `frame`-th step the body, `ends` [G, 2, 3] of capsules with `radius` [G] and `corners`
    [N, 8, 3] of boxes (m).

    Raises:
        ConfigError: the run has no checkpoint yet, or was saved without its replay.
        RunFailed: none can be read.
    """
    # On one device, on however many it was trained.
    program = run.load(folder, dataclasses.replace(run.read_config(folder), devices=1))
    state = jax.tree.map(lambda x: x[0], run.trained(folder, program))
    if program.learner.adapt and not program.config.checkpoint.replay:
        raise ConfigError(f"{folder} was saved without its replay, which adaptation needs")
    count = len(jax.tree.leaves(program.held_out)[0])
    most = min(count, _BODIES if hasattr(program.env, "shapes") else _TASKS)
    chosen = np.unique(np.linspace(0, count - 1, most).round().astype(int))
    tasks = jax.tree.map(lambda x: x[chosen], program.held_out)
    found = play(program, state, tasks, derive(state.key, "report"))
    every = -(-found["alive"].shape[2] // _FRAMES)
    for name in ("ends", "radius", "corners"):
        if name in found:
            found[name] = found[name][:, :, ::every].astype(np.float32)
    found |= {f"task/{name}": np.asarray(leaf) for name, leaf in tasks.items()}
    names = task_names(program.env, tasks)
    numbered = len(set(names)) < len(names)
    found["names"] = np.array([f"{i}: {x}" if numbered else x for i, x in enumerate(names)])
    found["frame"] = np.array(every)
    found["sides"] = np.array([called(program.config, stage) for stage in program.ends])
    found["dt"] = np.array(getattr(program.env, "dt", 0.0))
    found["env_steps"] = np.array(int(state.rounds) * program.config.steps_per_round)
    new = folder / f".{EPISODES}"
    with new.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **found)
    new.replace(folder / EPISODES)


def play(program: Program, state: TrainState, tasks: Task, key: Key) -> dict[str, np.ndarray]:
    """Plays tasks [K], the episodes of each that `record` names.

    Returns:
        Leaves [K, N, T, ...], as `record` writes them, the body of every step.
    """
    keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
    played = jax.jit(jax.vmap(functools.partial(_play, program, state.agent, state.memory)))
    return {name: np.asarray(leaf) for name, leaf in played(tasks, keys).items()}


def _play(program: Program, agent: Any, memory: Any, task: Task, key: Key) -> dict[str, Array]:
    """Returns the episodes of one task, leaves [N, T, ...]."""
    config, env, learner = program.config, program.env, program.learner
    if learner.adapt is None:
        return _trial(program, learner.actor(agent), task, key)
    task_key, draws = derive(key, "task"), derive(key, "adaptation")
    _, _, adapted = evaluate.evaluate_task(
        config, env, learner, agent, memory, task, task_key, draws
    )
    games = evaluate.games_of(config, env, task, task_key, len(learner.stages) - 1)
    games = jax.tree.map(lambda x: x[-1], games)
    start = jax.tree.map(lambda x: x[0], games.starts)
    step_key = jax.random.split(games.key, len(games.starts.step))[0]
    before = learner.actor(agent)
    actors = jax.tree.map(lambda x, y: jnp.stack([x, y]), before, adapted)

    def one(actor: Actor) -> dict[str, Array]:
        policy = learner.greedy(actor, games.reach, 0.0)
        row = rollout.begin(policy, start)
        return _seen(rollout.episode(env, policy, row, step_key, _show(env, policy)))

    return jax.vmap(one)(actors)


def _trial(program: Program, actor: Actor, task: Task, key: Key) -> dict[str, Array]:
    """Returns the first and the last episode of a trial, if it has two."""
    env, count = program.env, len(program.stages)
    policy = program.learner.greedy(actor, jnp.int32(0), 0.0)
    keys = jax.random.split(derive(key, "starts"), count)
    starts = jax.vmap(env.reset, in_axes=(0, None))(keys, task)
    played = rollout.trial(env, policy, starts, derive(key, "episodes"), _show(env, policy))
    return jax.tree.map(lambda x: x[jnp.array(sorted({0, count - 1}))], _seen(played))


def _seen(played: rollout.Played) -> dict[str, Array]:
    """Returns what a page shows of episodes [..., T]."""
    return played.shown | {"alive": played.valid, "reward": played.steps.reward}


def _show(env: Any, policy: Policy) -> Callable[[ActorCarry], dict[str, Array]]:
    """Returns what a page shows of a row before a step."""
    return lambda row: {"context": policy.context(row.history)} | _of_body(env, row)


def _of_body(env: Any, row: ActorCarry) -> dict[str, Array]:
    """Where a body is: a point, by what it observes, or the shapes of a model."""
    if hasattr(env, "shapes"):
        physics, task = row.env_state.physics, row.env_state.task
        return {"place": env.torso(physics)[:2]} | env.shapes(physics, task)._asdict()
    if env.body == "point":
        return {"place": row.env_state.observation[:2]}
    return {}
