"""Draws where the ants of a run walk, before and after training."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from experiments import run
from experiments.figures import drawing
from experiments.program import Program
from jmql import rollout
from jmql.keys import derive
from jmql.settings import ConfigError
from jmql.types import Array, Key, Params, Task


def walk(program: Program, actor_params: Params, key: Key) -> Array:
    """Returns where the torso is over episodes of the held-out tasks [K], NaN once one has ended.

    [K, config.evaluate.episodes, episode_length, 2] (m).
    """
    env: Any = program.env
    policy = program.learner.greedy(actor_params, jnp.float32(jnp.inf), 0.0)

    def episode(task: Task, key: Key) -> Array:
        start_key, key = jax.random.split(key)
        start = env.reset(start_key, task)

        def step(carry: tuple[Any, Array], key: Key) -> Any:
            row, on = carry
            row, transition = rollout.act(env, policy, row, key)
            place = jnp.where(on, env.torso(row.env_state.physics)[:2], jnp.nan)
            return (row, on & ~(transition.terminated | transition.truncated)), place

        row = rollout.begin(policy, start)
        keys = jax.random.split(key, env.episode_length)
        return jax.lax.scan(step, (row, jnp.ones((), bool)), keys)[1]

    config = program.config
    keys = jax.random.split(key, (config.tasks.held_out, config.evaluate.episodes))
    return jax.vmap(jax.vmap(episode, in_axes=(None, 0)))(program.held_out, keys)


def draw(folder: Path, picture: Path) -> None:
    """Draws paths of the torso seen from above, of the untrained and of the trained policy.

    Raises:
        ConfigError: the folder is not a run of an ant with a checkpoint.
    """
    import matplotlib.pyplot as plt

    program = run.load(folder, run.read_config(folder))
    if program.env.body != "ant":
        valid = ", ".join(name for name in envs.FAMILIES if envs.load(name).body == "ant")
        raise ConfigError(f"{folder} is a run of {program.config.task}; valid: {valid}")
    trained = run.trained(folder, program)
    untrained = jax.jit(lambda keys: program.init(keys).agent)(program.keys)
    paths = jax.jit(functools.partial(walk, program))
    key = derive(program.keys[0], "picture")
    steps = int(trained.rounds[0]) * program.config.steps_per_round
    after = f"after {steps:,} steps, before adaptation"
    agents = {"untrained": untrained, after: trained.agent}
    walked = {
        name: np.asarray(paths(jax.tree.map(lambda x: x[0], program.learner.actor(agent)), key))
        for name, agent in agents.items()
    }
    places = np.concatenate([x.reshape(-1, 2) for x in walked.values()])
    places = np.concatenate([places, program.held_out.get("goal", places[:1])])
    low, high = np.nanmin(places, axis=0), np.nanmax(places, axis=0)
    shape = (high[1] - low[1]) / (high[0] - low[0])
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2 * shape + 0.9), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, tasks) in zip(axes, walked.items(), strict=True):
        colors = plt.get_cmap("turbo")(np.linspace(0.9, 0.1, len(tasks)))
        for i, (color, episodes) in enumerate(zip(colors, tasks, strict=True)):
            task = jax.tree.map(lambda x, i=i: x[i], program.held_out)
            way = program.env.way(task)
            if "goal" in task:
                axis.plot(*task["goal"], "*", color=color, markersize=11)
            elif way is not None:
                arrow = dict(angles="xy", scale_units="xy", scale=4 / (high - low).max())
                axis.quiver(0, 0, *way, color=color, alpha=0.25, width=0.012, **arrow)
            lines = axis.plot(*episodes.transpose(2, 1, 0), color=color, linewidth=1.0)
            lines[0].set_label(program.env.title(task))
        axis.plot(0, 0, "o", color="black", markersize=3)
        drawing.seen_from_above(axis, name, " (m)")
    if "angle" in program.held_out:
        axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(picture, dpi=120, bbox_inches="tight")
