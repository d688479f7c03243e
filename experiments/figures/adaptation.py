"""Draws what adaptation brings by shots, and what it reuses, from committed rows of studies."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments import statistics

RESULTS = Path("experiments/results/adaptation/studies")
# Ways to adapt in the order of the legend, what they are called there, and their colors.
_WAYS = {
    "as set": ("reuse by propensity", "#c2410c"),
    "weights of one": ("reuse with weights of one", "#ca8a04"),
    "new data alone": ("new data alone", "#1d4ed8"),
    "from nothing": ("from nothing", "#64748b"),
    "oracle": ("sees the task", "#15803d"),
}
Rows = list[dict[str, Any]]


def draw(picture: Path) -> None:
    """Draws a column a study: interquartile mean of returns over shots, with 95 % intervals; and
    under it the map of reuse, of new tasks over training tasks, each in the order of its parameter.
    """
    import matplotlib.pyplot as plt

    files = sorted(RESULTS.glob("*.jsonl"))
    size = (3.4 * len(files), 5.6)
    figure, axes = plt.subplots(2, len(files), figsize=size, layout="constrained", squeeze=False)
    for column, path in zip(axes.T, files, strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        draw_shots(column[0], rows)
        column[0].set_title(path.stem, fontsize=10)
        _draw_map(column[1], [row for row in rows if row["adapted"] == "as set"])
        for axis in column:
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("return on new tasks", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=150)


def returns(rows: Rows) -> np.ndarray:
    """Returns the returns of rows, one a seed, before adaptation and after each shot:
    [shots + 1, S, N].
    """
    shots = rows[0]["measured"]["adapt.shots"]
    stages = ["pre", *(f"shot{i}" for i in range(1, shots)), "post"]
    return np.array([[row[f"tasks/return_{stage}"] for row in rows] for stage in stages])


def order(tasks: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places [N] of tasks by their parameter, and the parameter [N]: an angle where a
    task is a place on the plane, else the first number of the first parameter.
    """
    leaf = np.array(next(iter(tasks.values())))
    number = np.arctan2(*leaf.T[::-1]) if leaf.ndim == 2 else leaf
    return np.argsort(number), number


def draw_shots(axis: Any, rows: Rows) -> None:
    """Draws the interquartile mean of returns over shots, a line a way to adapt."""
    seen = []
    for way, (label, color) in _WAYS.items():
        mine = [row for row in rows if row["adapted"] == way]
        if not mine:
            continue
        by_shot = returns(mine)
        middle = [statistics.interquartile_mean(x.ravel()) for x in by_shot]
        low, high = np.array(
            [statistics.interval(x, statistics.interquartile_mean) for x in by_shot]
        ).T
        axis.fill_between(range(len(by_shot)), low, high, color=color, alpha=0.12, linewidth=0)
        axis.plot(middle, color=color, linewidth=1.6, marker="o", markersize=3, label=label)
        if way != "from nothing":  # which may fall out of the picture
            seen += [*low, *high]
    room = 0.25 * (max(seen) - min(seen))
    axis.set_ylim(min(seen) - 2 * room, max(seen) + room)
    axis.set_xticks(range(len(middle)))
    axis.set_xlabel("shots: episodes of the new task", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_map(axis: Any, rows: Rows) -> None:
    shares = np.mean([row["tasks/reuse"] for row in rows], axis=0)
    new, new_number = order(rows[0]["tasks/parameters"])
    old, old_number = order(rows[0]["train_tasks"])
    shares = shares[new][:, old] * len(old)
    axis.pcolormesh(old_number[old], new_number[new], shares, cmap="Oranges", shading="nearest")
    name = next(iter(rows[0]["tasks/parameters"]))
    axis.set_xlabel(f"{name} of training tasks", fontsize=8)
    axis.set_ylabel(f"{name} of new tasks", fontsize=8)
