"""Draws where a point walks towards goals that it has not met, before and after shots."""

import dataclasses
from pathlib import Path

import numpy as np

import envs
from experiments import evaluate, run
from jmql.keys import derive
from jmql.settings import ConfigError

_SHOTS = (0, 1, 2, 5)  # before the episodes that are drawn
_TASKS = 8


def draw(folder: Path, picture: Path) -> None:
    """Draws the episodes by which seed 0 of a run adapts to fresh held-out goals, noise included.

    Raises:
        ConfigError: the folder is not a run of a point with a checkpoint.
    """
    import matplotlib.pyplot as plt

    config = run.read_config(folder)
    valid = [name for name in envs.FAMILIES if envs.load(name).body == "point"]
    if config.task not in valid:
        raise ConfigError(f"{folder} is a run of {config.task}; valid: {', '.join(valid)}")
    adapt = dataclasses.replace(config.adapt, shots=max(_SHOTS) + 1, episodes=1)
    program = run.load(folder, dataclasses.replace(config, adapt=adapt), _TASKS)
    key = derive(program.keys[0], "picture")
    tasks = program.env.sample_tasks(key, _TASKS, program.held_out_ranges)
    state = run.trained(folder, program)
    data = evaluate.prepare(program, state, tasks, key, with_data=True)(adapt.updates).data
    assert data is not None
    steps = data.transitions
    # [N, shots, T + 1, 2] of seed 0: what a point observes is where it is.
    places = np.concatenate([steps.observation[0], steps.next_observation[0, :, :, -1:]], axis=2)
    colors = plt.get_cmap("turbo")(np.linspace(0.1, 0.9, _TASKS))
    goals = np.asarray(tasks["goal"])
    turn = np.argsort(np.arctan2(goals[:, 1], goals[:, 0]))
    figure, axes = plt.subplots(
        1,
        len(_SHOTS),
        figsize=(2.6 * len(_SHOTS), 2.5),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    trained = np.asarray(program.train_tasks["goal"])
    for axis, shot in zip(axes, _SHOTS, strict=True):
        axis.plot(*trained.T, ".", color="#cbd5e1", markersize=4)
        for color, i in zip(colors, turn, strict=True):
            axis.plot(*goals[i], "*", color=color, markersize=9)
            axis.plot(*places[i, shot].T, color=color, linewidth=1.0)
        title = f"after {shot} shot{'s' if shot > 1 else ''}" if shot else "before"
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("x", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_aspect("equal")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("y", fontsize=8)
    figure.savefig(picture, dpi=150, bbox_inches="tight")
