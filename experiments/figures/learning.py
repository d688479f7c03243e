"""Draws returns over training, from the committed rows of the profiles."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path("experiments/results")
_COLORS = {"quick": "#c2410c", "tuned": "#15803d", "paper": "#1d4ed8"}  # of profiles
# What others report on MuJoCo's physics: steps, return, hours where said. Held-out return; public
# logs of a PyTorch PEARL on an RTX 3080 and of MQL's release (docs/method.md section 4).
_PEERS: dict[str, dict[str, list[tuple[float, ...]]]] = {
    "cheetah_dir": {
        "PEARL, RTX 3080": [(300_000, 840.0), (1_000_000, 1502.0, 7.4)],
        "MQL's release": [(200_000, 832.0)],
    },
    "cheetah_vel": {"PEARL, RTX 3080": [(300_000, -56.0), (500_000, -40.0, 5.5)]},
    "ant_dir": {"PEARL, RTX 3080": [(1_000_000, 876.0)]},
    "walker_params": {
        "PEARL, RTX 3080": [(1_000_000, 724.0)],
        "MQL's release": [(1_000_000, 426.0)],
    },
}


def draw(picture: Path) -> None:
    """Draws a column a task: held-out return before adaptation over steps, and over minutes.

    A line is the mean over seeds, and a band reaches from the lowest seed to the highest.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    files = {(path.stem, name): path for name in _COLORS for path in _files(name)}
    tasks = sorted({task for task, _ in files})
    size = (3.2 * len(tasks), 5.2)
    figure, axes = plt.subplots(2, len(tasks), figsize=size, layout="tight", squeeze=False)
    for column, task in zip(axes.T, tasks, strict=True):
        for name, color in _COLORS.items():
            if (task, name) in files:
                _draw_runs(column, files[task, name], name, color)
        _draw_peers(column, task)
        column[0].set_title(task, fontsize=10)
        column[0].set_xlabel("environment steps (thousands)", fontsize=8)
        column[1].set_xlabel("minutes, without compiling", fontsize=8)
        column[1].set_xscale("log")
        column[1].xaxis.set_minor_formatter(NullFormatter())  # within a decade they would overlap
        for axis, corner in zip(column, ("lower right", "upper left"), strict=True):
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7, frameon=False, loc=corner)
    for axis in axes[:, 0]:
        axis.set_ylabel("return on held-out tasks", fontsize=8)
    figure.savefig(picture, dpi=150)


def _files(profile: str) -> list[Path]:
    return sorted((RESULTS / profile).glob("*.jsonl"))


def _draw_runs(column: Any, path: Path, label: str, color: str) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    run = json.loads(path.with_suffix(".config.json").read_text(encoding="utf-8"))
    seeds = [[row for row in rows if row["seed"] == s] for s in sorted({r["seed"] for r in rows})]
    steps = np.array([row["env_steps"] for row in seeds[0]])
    returns = np.array([[row["eval/return_pre"] for row in mine] for mine in seeds])
    minutes = np.mean([_minutes(mine, len(run["seeds"])) for mine in seeds], axis=0)
    for axis, x in ((column[0], steps / 1e3), (column[1], minutes)):
        axis.fill_between(x, returns.min(0), returns.max(0), color=color, alpha=0.2, linewidth=0)
        axis.plot(x, returns.mean(0), color=color, linewidth=1.6, label=label)


def _minutes(rows: list[dict[str, Any]], together: int) -> np.ndarray:
    """Returns the wall time of each row of a seed from its start, compiling left out.

    Rows say how fast all seeds that were trained together are as one.
    """
    speed = np.array([row["time/env_steps_per_second"] for row in rows])
    steps = np.diff([row["env_steps"] for row in rows], prepend=0)
    return together * np.cumsum(steps / speed) / 60


def _draw_peers(column: Any, task: str) -> None:
    for (label, points), marker in zip(_PEERS.get(task, {}).items(), "sD", strict=False):
        steps, returns = zip(*[point[:2] for point in points], strict=True)
        thousands = np.array(steps) / 1e3
        column[0].plot(thousands, returns, marker, color="#475569", markersize=4, label=label)
        for _, value, *hours in points:
            if hours:
                text = f"{label}, {hours[0]:g} h"
                minutes = 60 * hours[0]
                column[1].plot(minutes, value, marker, color="#475569", markersize=4, label=text)
