"""Draws what the families look like: a film strip of two tasks of each."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.base import Film
from envs.physics import Shapes
from experiments.figures.drawing import camera, draw_body
from jmql.types import Array, Key, Task

ACCENT, QUIET = "#c2410c", "#475569"
FRAMES, TASKS, TRIALS = 4, 2, 64
FRAME, NAME, GAP = 1.9, 2.5, 0.4  # widths of a frame, of the names, and between two tasks (m)


def play(env: Any, steps: int, task: Task, key: Key) -> tuple[Shapes, Array]:
    """Plays an episode with a sine wave on every motor, of one size and rate and of random phases.

    Returns:
        The body after each step, leaves [steps, ...], and the return [].
    """
    size_key, rate_key, phase_key, reset_key = jax.random.split(key, 4)
    size = jax.random.uniform(size_key, minval=0.2, maxval=0.6)
    rate = jax.random.uniform(rate_key, minval=1.0, maxval=3.0)  # Hz
    phase = jax.random.uniform(phase_key, (env.action_size,))
    seconds = env.dt * jnp.arange(steps)[:, None]
    start = env.reset(reset_key, task)

    def step(carry: tuple[Any, Array], action: Array) -> Any:
        state, alive = carry
        state = env.step(state, action)
        alive = alive & ~(state.terminated | state.truncated)
        reward = jnp.where(alive, state.reward, 0.0)
        return (state, alive), (env.shapes(state.physics, task), reward)

    actions = size * jnp.sin(2 * jnp.pi * (rate * seconds + phase))
    _, (shapes, rewards) = jax.lax.scan(step, (start, jnp.ones((), bool)), actions)
    return shapes, rewards.sum()


def best(name: str, film: Film) -> tuple[Task, Shapes]:
    """Draws tasks and plays each with the waves that earn most of `TRIALS`.

    Returns:
        The tasks, leaves [TASKS, ...], and the body in each frame, leaves [TASKS, FRAMES, ...].
    """
    env: Any = envs.make(name)
    steps = round(film.seconds / env.dt)
    keys = jax.random.split(jax.random.key(2), (TASKS, TRIALS))
    tasks = env.sample_tasks(jax.random.key(5), TASKS)
    over_keys = jax.vmap(functools.partial(play, env, steps), in_axes=(None, 0))
    played = jax.jit(jax.vmap(over_keys, in_axes=(0, 0)))(tasks, keys)
    shapes, returns = jax.tree.map(np.asarray, played)
    frames = np.linspace(0, steps - 1, FRAMES).round().astype(int)
    chosen = np.arange(TASKS), returns.argmax(axis=1)
    return tasks, jax.tree.map(lambda x: x[chosen][:, frames], shapes)


def draw(picture: Path) -> None:
    """Draws a film strip of two tasks of each family, all at one scale."""
    import matplotlib.pyplot as plt

    width = NAME + TASKS * (FRAMES * FRAME + GAP)
    kinds = {name: envs.load(name) for name in envs.FAMILIES}
    shown = {name: kind.film for name, kind in kinds.items() if kind.film and kind.parameters}
    height = sum(film.height for film in shown.values())
    figure = plt.figure(figsize=(10, 10 * height / width))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0, width), ylim=(-height, 0))
    axis.axis("off")
    floor = 0.0
    for name, film in shown.items():
        top, floor = floor, floor - film.height
        eye = camera(film.elevation, film.azimuth)
        family = envs.load(name)
        tasks, shapes = best(name, film)
        base = floor + 0.2 + 0.5 * np.sin(np.radians(film.elevation))
        axis.text(0.1, top - 0.45, name, fontsize=10, weight="bold", va="top")
        axis.text(0.1, top - 0.8, family.caption, fontsize=8, color=QUIET, va="top")
        for i in range(TASKS):
            left = NAME + i * (FRAMES * FRAME + GAP)
            task = jax.tree.map(lambda x, i=i: x[i], tasks)
            title = family.title(task)
            axis.text(left + 0.75, top - 0.2, title, fontsize=8, color=ACCENT, va="center")
            way = family.way(task)
            if way is not None:
                tip = 0.27 * eye[:2, :2] @ way
                middle = np.array([left + 0.37, top - 0.2])
                arrow = dict(arrowstyle="-|>", color=ACCENT, shrinkA=0, shrinkB=0, mutation_scale=9)
                axis.annotate("", middle + tip, middle - tip, arrowprops=arrow)
            if not film.elevation:
                axis.plot([left, left + FRAMES * FRAME], [base, base], color="#94a3b8", lw=0.8)
            for frame in range(FRAMES):
                place = np.array([left + (frame + 0.5) * FRAME, base])
                body = jax.tree.map(lambda x, at=(i, frame): x[at], shapes)
                draw_body(axis, eye, body, place)
    figure.savefig(picture, dpi=120)
