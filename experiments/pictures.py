"""Draws what the families look like, and where the ants of a run walk.

Run with `python -m experiments.pictures families docs/families.png` (some minutes, for the most
part to compile MJX) or `python -m experiments.pictures paths RUN docs/paths.png`.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import envs
from envs.ant import heading
from experiments import run
from experiments.presets import RunFailed
from experiments.run import Setup
from jmql import rollout
from jmql.config import ConfigError
from jmql.keys import derive
from jmql.types import Array, Key, Params, Task

BODY, EDGE, SHADOW, ACCENT, QUIET = "#64748b", "white", "#e2e8f0", "#c2410c", "#475569"
ANTS = ("ant_dir", "ant_goal")
FRAMES, TASKS, TRIALS = 4, 2, 64
FRAME, NAME, GAP = 1.9, 2.5, 0.4  # widths of a frame, of the names, and between two tasks (m)


@dataclasses.dataclass(frozen=True)
class Film:
    """How a family is shown."""

    caption: str  # what its tasks are
    elevation: float  # of the eye (degrees); 0 looks along the y axis, or at an azimuth from it
    azimuth: float
    seconds: float
    height: float  # room for a frame and its title (m)


FILMS = {
    "cheetah_dir": Film("run forward\nor backward", 0.0, 0.0, 0.7, 1.6),
    "cheetah_vel": Film("run at a speed\nof 0 to 3 m/s", 0.0, 0.0, 0.7, 1.6),
    "ant_dir": Film("run forward\nor backward", 30.0, 15.0, 0.7, 1.8),
    "ant_goal": Film("go to a place\nwithin 3 m", 30.0, 15.0, 0.7, 1.8),
    "humanoid_dir": Film("run in a\ndirection", 20.0, 35.0, 0.45, 2.35),
    "walker_params": Film("run with a body\nof another build", 0.0, 0.0, 0.4, 2.15),
}


def play(env: Any, steps: int, task: Task, key: Key) -> tuple[Array, Array, Array]:
    """Plays an episode with a sine wave on every motor, of one size and rate and of random phases.

    Returns:
        Ends [steps, G, 2, 3] and radius [G] of the body's capsules (m), and the return [].
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
        return (state, alive), (env.capsules(state.physics).ends, reward)

    actions = size * jnp.sin(2 * jnp.pi * (rate * seconds + phase))
    _, (ends, rewards) = jax.lax.scan(step, (start, jnp.ones((), bool)), actions)
    return ends, env.capsules(start.physics).radius, rewards.sum()


def best(name: str) -> tuple[Task, np.ndarray, np.ndarray]:
    """Draws tasks and plays each with the waves that earn most of `TRIALS`.

    Returns:
        The tasks, leaves [TASKS, ...]; ends [TASKS, FRAMES, G, 2, 3] and radius [G] of the body's
        capsules (m).
    """
    env: Any = envs.make(name)
    steps = round(FILMS[name].seconds / env.dt)
    keys = jax.random.split(jax.random.key(2), (TASKS, TRIALS))
    tasks = env.sample_tasks(jax.random.key(5), TASKS)
    over_keys = jax.vmap(functools.partial(play, env, steps), in_axes=(None, 0))
    played = jax.jit(jax.vmap(over_keys, in_axes=(0, 0)))(tasks, keys)
    ends, radius, returns = jax.tree.map(np.asarray, played)
    frames = np.linspace(0, steps - 1, FRAMES).round().astype(int)
    return tasks, ends[np.arange(TASKS), returns.argmax(axis=1)][:, frames], radius[0, 0]


def title(task: Task) -> tuple[str, np.ndarray]:
    """Returns one task in words, and which way it wants the body to go, [2]."""
    if "direction" in task:
        sign = float(task["direction"])
        return ("forward" if sign > 0 else "backward"), np.array([sign, 0.0])
    if "velocity" in task:
        speed = float(task["velocity"])
        return f"{speed:.1f} m/s", np.array([speed / 2, 0.0])
    if "angle" in task:
        return f"{np.degrees(task['angle']):.0f}°", np.asarray(heading(task["angle"]))
    if "goal" in task:
        x, y = np.asarray(task["goal"])
        return f"({x:.1f}, {y:.1f}) m".replace("-", "−"), np.array([x, y]) / np.hypot(x, y)
    low, high = float(task["mass"].min()), float(task["mass"].max())
    return f"masses × {low:.1f} to {high:.1f}", np.array([1.0, 0.0])


def camera(elevation: float, azimuth: float) -> np.ndarray:
    """Returns the axes of a picture, in the world: right, up, and away from the eye, [3, 3]."""
    tilt, turn = np.radians([elevation, azimuth])
    right = np.array([np.cos(turn), np.sin(turn), 0.0])
    level, up = np.array([-np.sin(turn), np.cos(turn), 0.0]), np.array([0.0, 0.0, 1.0])
    return np.stack(
        [
            right,
            np.cos(tilt) * up + np.sin(tilt) * level,
            np.cos(tilt) * level - np.sin(tilt) * up,
        ]
    )


def outline(ends: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns how capsules look, as polygons [G, 34, 2], for ends [G, 2, 2] in the picture."""
    way = ends[:, 1] - ends[:, 0]
    angle = np.arctan2(way[:, 1], way[:, 0])[:, None] + np.linspace(-np.pi / 2, np.pi / 2, 17)
    cap = radius[:, None, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return np.concatenate([ends[:, 1:] + cap, ends[:, :1] - cap], axis=1)


def draw_body(
    axis: Any, eye: np.ndarray, ends: np.ndarray, radius: np.ndarray, place: np.ndarray
) -> None:
    """Draws a body and its shadow at a place [2] of the picture, the farthest parts first."""
    from matplotlib.collections import PolyCollection

    ground = ends[..., :2] - (ends[..., :2].min((0, 1)) + ends[..., :2].max((0, 1))) / 2
    shadow = outline(ground, radius) @ eye[:2, :2].T + place
    axis.add_collection(PolyCollection(shadow, facecolors=SHADOW, edgecolors=SHADOW))
    seen = np.concatenate([ground, ends[..., 2:]], axis=-1) @ eye.T
    order = np.argsort(-seen[..., 2].mean(axis=1), kind="stable")
    body = outline(seen[..., :2], radius)[order] + place
    axis.add_collection(PolyCollection(body, facecolors=BODY, edgecolors=EDGE, linewidths=0.6))


def draw_families(picture: Path) -> None:
    """Draws a film strip of two tasks of each family, all at one scale."""
    import matplotlib.pyplot as plt

    width = NAME + TASKS * (FRAMES * FRAME + GAP)
    height = sum(film.height for film in FILMS.values())
    figure = plt.figure(figsize=(10, 10 * height / width))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0, width), ylim=(-height, 0))
    axis.axis("off")
    floor = 0.0
    for name, film in FILMS.items():
        top, floor = floor, floor - film.height
        eye = camera(film.elevation, film.azimuth)
        tasks, ends, radius = best(name)
        base = floor + 0.2 + 0.5 * np.sin(np.radians(film.elevation))
        axis.text(0.1, top - 0.45, name, fontsize=10, weight="bold", va="top")
        axis.text(0.1, top - 0.8, film.caption, fontsize=8, color=QUIET, va="top")
        for i in range(TASKS):
            left = NAME + i * (FRAMES * FRAME + GAP)
            words, way = title(jax.tree.map(lambda x, i=i: x[i], tasks))
            axis.text(left + 0.75, top - 0.2, words, fontsize=8, color=ACCENT, va="center")
            tip = 0.27 * eye[:2, :2] @ way
            middle = np.array([left + 0.37, top - 0.2])
            arrow = dict(arrowstyle="-|>", color=ACCENT, shrinkA=0, shrinkB=0, mutation_scale=9)
            axis.annotate("", middle + tip, middle - tip, arrowprops=arrow)
            if not film.elevation:
                axis.plot([left, left + FRAMES * FRAME], [base, base], color="#94a3b8", lw=0.8)
            for frame in range(FRAMES):
                place = np.array([left + (frame + 0.5) * FRAME, base])
                draw_body(axis, eye, ends[i, frame], radius, place)
    figure.savefig(picture, dpi=120)


def walk(setup: Setup, actor_params: Params, key: Key) -> Array:
    """Returns where the torso is over episodes of the held-out tasks [K], NaN once one has ended.

    [K, config.evaluate.episodes, episode_length, 2] (m).
    """
    env: Any = setup.env
    policy = rollout.greedy(setup.networks, actor_params)

    def episode(task: Task, key: Key) -> Array:
        start_key, key = jax.random.split(key)
        start = env.reset(start_key, task)

        def step(carry: tuple[Any, Array], key: Key) -> Any:
            row, on = carry
            row, transition = rollout.act(env, policy, row, key)
            place = jnp.where(on, env.torso(row.env_state.physics)[:2], jnp.nan)
            return (row, on & ~(transition.terminated | transition.truncated)), place

        row = rollout.begin(env, start, setup.config.network.history_length)
        keys = jax.random.split(key, env.episode_length)
        return jax.lax.scan(step, (row, jnp.ones((), bool)), keys)[1]

    config = setup.config
    keys = jax.random.split(key, (config.tasks.held_out, config.evaluate.episodes))
    return jax.vmap(jax.vmap(episode, in_axes=(None, 0)))(setup.held_out, keys)


def draw_paths(folder: Path, picture: Path) -> None:
    """Draws paths of the torso seen from above, of the untrained and of the trained policy.

    Raises:
        ConfigError: the folder is not a run of an ant with a checkpoint.
    """
    import matplotlib.pyplot as plt

    setup = run.load(folder, run.read_config(folder))
    if setup.config.task not in ANTS:
        raise ConfigError(f"{folder} is a run of {setup.config.task}; valid: {', '.join(ANTS)}")
    trained = run.trained(folder, setup)
    untrained = jax.jit(lambda keys: setup.init(keys).agent)(setup.keys)
    paths = jax.jit(functools.partial(walk, setup))
    key = derive(setup.keys[0], "picture")
    steps = int(trained.rounds[0]) * setup.config.steps_per_round
    after = f"after {steps:,} steps, before adaptation"
    agents = {"untrained": untrained, after: trained.agent}
    walked = {
        name: np.asarray(paths(jax.tree.map(lambda x: x[0], agent.params["actor"]), key))
        for name, agent in agents.items()
    }
    places = np.concatenate([x.reshape(-1, 2) for x in walked.values()])
    places = np.concatenate([places, setup.held_out.get("goal", places[:1])])
    low, high = np.nanmin(places, axis=0), np.nanmax(places, axis=0)
    shape = (high[1] - low[1]) / (high[0] - low[0])
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2 * shape + 0.9), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, tasks) in zip(axes, walked.items(), strict=True):
        colors = plt.get_cmap("turbo")(np.linspace(0.9, 0.1, len(tasks)))
        for i, (color, episodes) in enumerate(zip(colors, tasks, strict=True)):
            task = jax.tree.map(lambda x, i=i: x[i], setup.held_out)
            words, way = title(task)
            if "goal" in task:
                axis.plot(*task["goal"], "*", color=color, markersize=11)
            else:
                arrow = dict(angles="xy", scale_units="xy", scale=4 / (high - low).max())
                axis.quiver(0, 0, *way, color=color, alpha=0.25, width=0.012, **arrow)
            lines = axis.plot(*episodes.transpose(2, 1, 0), color=color, linewidth=1.0)
            lines[0].set_label(f"task {words}")
        axis.plot(0, 0, "o", color="black", markersize=3)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("x (m)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_aspect("equal")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("y (m)", fontsize=8)
    if "angle" in setup.held_out:
        axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(picture, dpi=120, bbox_inches="tight")


def main() -> None:
    """Draws the picture that the command line names."""
    mpl.use("agg")
    try:
        match sys.argv[1:]:
            case ["families", picture]:
                draw_families(Path(picture))
            case ["paths", folder, picture]:
                draw_paths(Path(folder), Path(picture))
            case _:
                sys.exit(
                    "usage: python -m experiments.pictures families PICTURE | paths RUN PICTURE"
                )
    except (ConfigError, RunFailed) as error:
        sys.exit(f"pictures: {error}")


if __name__ == "__main__":
    main()
