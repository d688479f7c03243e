"""Draws single tasks: P3O, A2C and Brax's PPO over training, and what the paper reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.learning import RESULTS

_ROWS = RESULTS / "p3o"
TASKS = ("half_cheetah", "hopper", "walker2d")
_COLORS = {"P3O": "#c2410c", "A2C": "#1d4ed8", "Brax PPO": "#15803d"}
# Fakoor et al. 2019, table 2: after 3,000,000 steps, 10 seeds.
PAPER = {
    "half_cheetah": {"P3O": 5052, "A2C": 1907, "PPO": 2022},
    "hopper": {"P3O": 2334, "A2C": 1708, "PPO": 2245},
    "walker2d": {"P3O": 3771, "A2C": 2015, "PPO": 2728},
}


def lines(name: str) -> list[dict[str, Any]]:
    """Returns the lines of a file of results."""
    path = _ROWS / f"{name}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def curves(task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns of each algorithm steps [E] and returns [S, E] of seeds."""
    found: dict[str, list[tuple[list[int], list[float]]]] = {}
    for line in lines("table"):
        if line["task"] == task:
            name = "A2C" if line["changed"].get("p3o.off_policy_steps") == 0 else "P3O"
            found.setdefault(name, []).append((line["env_steps"], line["eval/return_pre"]))
    of_ppo: dict[int, list[dict[str, Any]]] = {}
    for row in lines("brax_ppo"):
        if row["task"] == task:
            of_ppo.setdefault(row["seed"], []).append(row)
    for rows in of_ppo.values():
        curve = [row["env_steps"] for row in rows], [row["return"] for row in rows]
        found.setdefault("Brax PPO", []).append(curve)
    return {
        name: (np.array(seeds[0][0]), np.array([returns for _, returns in seeds]))
        for name, seeds in found.items()
    }


def draw(picture: Path) -> None:
    """Draws a panel a task; a band reaches from the lowest seed to the highest."""
    import matplotlib.pyplot as plt

    tasks = [task for task in TASKS if curves(task)]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(3.6 * len(tasks), 3.4), layout="constrained"
    )
    for axis, task in zip(axes, tasks, strict=True):
        for name, (steps, returns) in curves(task).items():
            color, x = _COLORS[name], steps / 1e6
            axis.fill_between(x, returns.min(0), returns.max(0), color=color, alpha=0.2, lw=0)
            axis.plot(x, returns.mean(0), color=color, label=f"{name} ({_seeds(returns)})")
        for (name, value), style in zip(PAPER[task].items(), ("--", ":", "-."), strict=True):
            axis.axhline(value, color="#475569", linestyle=style, lw=1, label=f"paper: {name}")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("environment steps (millions)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return of an episode", fontsize=8)
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=150)


def _seeds(returns: np.ndarray) -> str:
    """Says how many seeds [S, ...] there are."""
    return f"{len(returns)} seed{'s' * (len(returns) > 1)}"


def table() -> str:
    """Returns returns after the last step, mean ± standard deviation over seeds, as Markdown."""
    names = [*_COLORS, *(f"paper: {name}" for name in ("P3O", "A2C", "PPO"))]
    text = f"| task | {' | '.join(names)} |\n|{' --- |' * (1 + len(names))}\n"
    for task in TASKS:
        found = curves(task)
        cells = [f"`{task}`"]
        for name in _COLORS:
            last = found[name][1][:, -1] if name in found else np.zeros(0)
            spread = f" ± {last.std(ddof=1):,.0f}" if len(last) > 1 else ""
            cells.append(f"{last.mean():,.0f}{spread} ({_seeds(last)})" if len(last) else "")
        text += f"| {' | '.join([*cells, *(f'{x:,}' for x in PAPER[task].values())])} |\n"
    return text


if __name__ == "__main__":
    print(table())
