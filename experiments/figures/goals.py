"""Draws where a point walks towards goals that it has not met, before and after shots."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

import envs
from experiments import evaluate, run
from experiments.figures import drawing
from jmql.keys import derive
from jmql.settings import ConfigError

_SHOTS = (0, 1, 2, 5)  # before the episodes that are drawn
_TASKS = 8


class Walked(NamedTuple):
    """How a run adapts to N goals."""

    trained: np.ndarray  # [K, 2] goals of training
    goals: np.ndarray  # [N, 2] new ones
    places: np.ndarray  # [N, shots, T + 1, 2] over the episode of each shot, noise included


def walk(folder: Path) -> Walked:
    """Adapts seed 0 of a run to fresh held-out goals.

    Raises:
        ConfigError: the folder is not a run of a point with a checkpoint.
    """
    config = run.read_config(folder)
    valid = [name for name in envs.FAMILIES if envs.load(name).body == "point"]
    if config.task not in valid:
        raise ConfigError(f"{folder} is a run of {config.task}; valid: {', '.join(valid)}")
    adapt = dataclasses.replace(config.adapt, shots=max(_SHOTS) + 1, episodes=1)
    program = run.load(folder, dataclasses.replace(config, adapt=adapt), _TASKS)
    key = derive(program.keys[0], "picture")
    tasks = program.env.sample_tasks(derive(key, "tasks"), _TASKS, program.held_out_ranges)
    adapted = evaluate.prepare(
        program, run.trained(folder, program), tasks, derive(key, "episodes"), with_data=True
    )
    data = adapted(adapt.updates).data
    assert data is not None
    steps = data.transitions  # what a point observes is where it is
    places = np.concatenate([steps.observation[0], steps.next_observation[0, :, :, -1:]], axis=2)
    return Walked(np.asarray(program.train_tasks["goal"]), np.asarray(tasks["goal"]), places)


def draw(folder: Path, picture: Path) -> None:
    """Draws the episodes by which a run adapts to goals that it has not met.

    Raises:
        ConfigError: the folder is not a run of a point with a checkpoint.
    """
    import matplotlib.pyplot as plt

    trained, goals, places = walk(folder)
    colors = plt.get_cmap("turbo")(np.linspace(0.1, 0.9, _TASKS))
    turn = np.argsort(np.arctan2(goals[:, 1], goals[:, 0]))
    figure, axes = plt.subplots(
        1,
        len(_SHOTS),
        figsize=(2.6 * len(_SHOTS), 2.5),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, shot in zip(axes, _SHOTS, strict=True):
        axis.plot(*trained.T, ".", color="#cbd5e1", markersize=4)
        for color, i in zip(colors, turn, strict=True):
            axis.plot(*goals[i], "*", color=color, markersize=9)
            axis.plot(*places[i, shot].T, color=color, linewidth=1.0)
        title = f"after {shot} shot{'s' if shot > 1 else ''}" if shot else "before"
        drawing.seen_from_above(axis, title)
    figure.savefig(picture, dpi=150, bbox_inches="tight")
