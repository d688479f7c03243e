"""Draws Meta-Q-Learning beside P3O on families: with a context, without, and told the task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.learning import RESULTS

TASKS = ("point_goal", "cheetah_dir")
_COLORS = {"MQL": "#1d4ed8", "P3O": "#c2410c"}
_STYLES = {"context": "-", "context over a trial": "--", "no context": ":", "told the task": "-."}


def runs(task: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Returns the lines of a family's seeds, by algorithm and by what it knows of the task."""
    path = RESULTS / "p3o" / "families.jsonl"
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["task"] == task:
            changed = line["changed"]
            told = "told the task" if changed.get("observe_task") else "context"
            if changed.get("network.context_size") == 0 and told == "context":
                told = "no context"
            if changed.get("context_span") == "trial":
                told = "context over a trial"
            name = "MQL" if line["algorithm"] == "mql" else "P3O"
            found.setdefault((name, told), []).append(line)
    order = [(name, told) for told in _STYLES for name in _COLORS]
    return {key: found[key] for key in order if key in found}


def curve(line: dict[str, Any], stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns steps, minutes of one core, without compiling, and returns of a seed, [E] each."""
    minutes = np.array(line["minutes"]) / line["changed"].get("seeds", 1)
    values = line.get(f"eval/return_{stage}", line["eval/return_pre"])
    there = [i for i, value in enumerate(values) if value is not None]
    earned = np.array([values[i] for i in there])
    return np.array(line["env_steps"])[there], minutes[there], earned


def at(lines: Sequence[dict[str, Any]], stage: str, axis: int, limit: float) -> np.ndarray:
    """Returns what seeds earned [S] at a step or a minute, on the line between two evaluations: NaN
    before the first, the last one's after it.
    """
    curves = [curve(line, stage) for line in lines]
    return np.array([np.interp(limit, x[axis], x[2], left=np.nan) for x in curves])


def draw(picture: Path) -> None:
    """Draws a row a family: returns before adaptation over steps, and over minutes; those over a
    trial are of its last episode. A line is the mean over seeds, at the evaluations of the first.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(TASKS), 2, figsize=(9, 3.2 * len(TASKS)), layout="constrained")
    for row, task in zip(axes, TASKS, strict=True):
        for (name, told), lines in runs(task).items():
            stage = "post" if told == "context over a trial" else "pre"
            grid = curve(lines[0], stage)
            for axis, i, scale in ((row[0], 0, 1e-3), (row[1], 1, 1.0)):
                mean = [at(lines, stage, 0, limit).mean() for limit in grid[0]]
                x, style = np.maximum(grid[i] * scale, 1e-2), _STYLES[told]
                axis.plot(x, mean, style, color=_COLORS[name], lw=1.5, label=f"{name}, {told}")
        for axis, label in zip(row, ("environment steps (thousands)", "minutes"), strict=True):
            axis.set_xscale("log")
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(task, fontsize=10)
        row[0].set_ylabel("return on held-out tasks", fontsize=8)
    names = {line.get_label(): line for axis in axes[:, 0] for line in axis.lines}
    figure.legend(
        names.values(), names, loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(picture, dpi=150)


def table() -> str:
    """Returns what stands in docs/p3o.md, as Markdown: at the steps that Meta-Q-Learning takes, at
    the minutes that both take, by their runs with a context, and at the end.
    """
    text = ""
    for task in TASKS:
        found = runs(task)
        ends = [_end(found[name, "context"]) for name in _COLORS]
        steps, minutes = ends[0][0], min(minutes for _, minutes in ends)
        heads = f"after {steps:,.0f} steps", f"after {minutes:.1f} minutes", "at the end"
        text += f"\n| `{task}` | {' | '.join(heads)} | steps, minutes there |\n{'| --- ' * 5}|\n"
        for (name, told), lines in found.items():
            limits = (0, steps), (1, minutes), (0, np.inf)
            cells = [_cell(lines, axis, limit) for axis, limit in limits]
            took = "{:,.0f}, {:.1f}".format(*_end(lines))
            text += f"| {name}, {told} | {' | '.join([*cells, took])} |\n"
    return text


def _end(lines: Sequence[dict[str, Any]]) -> np.ndarray:
    """Returns the last step and the last minute [2], means over seeds."""
    curves = (curve(line, "pre") for line in lines)
    return np.mean([(steps[-1], minutes[-1]) for steps, minutes, _ in curves], axis=0)


def _cell(lines: Sequence[dict[str, Any]], axis: int, limit: float) -> str:
    stages = ["pre"] + ["post"] * any("eval/return_post" in line for line in lines)
    found = (at(lines, stage, axis, limit) for stage in stages)
    digits = 1 if abs(at(lines, "pre", 0, np.inf)).mean() < 100 else 0
    return ", ".join(
        f"{x.mean():,.{digits}f}" + (f" ± {x.std(ddof=1):,.{digits}f}" if len(x) > 1 else "")
        for x in found
    )


if __name__ == "__main__":
    print(table())
