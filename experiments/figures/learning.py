"""Draws returns over training, from the committed results of the quick profile."""

import json
from pathlib import Path

RESULTS = Path("experiments/results/quick")


def draw(picture: Path) -> None:
    """Draws one panel a task: held-out return before and after adaptation over steps."""
    import matplotlib.pyplot as plt

    files = sorted(RESULTS.glob("*.jsonl"))
    figure, axes = plt.subplots(1, len(files), figsize=(3.2 * len(files), 2.8), layout="tight")
    for axis, path in zip(axes, files, strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for seed in sorted({row["seed"] for row in rows}):
            mine = [row for row in rows if row["seed"] == seed]
            steps = [row["env_steps"] / 1e3 for row in mine]
            for metric, label, color in (
                ("eval/return_pre", "before adaptation", "#9aa5b1"),
                ("eval/return_post", "after adaptation", "#c2410c"),
            ):
                returns = [row[metric] for row in mine]
                axis.plot(steps, returns, color=color, label=label, linewidth=1.6)
        axis.set_title(path.stem, fontsize=10)
        axis.set_xlabel("environment steps (thousands)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return on held-out tasks", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[:2], labels[:2], fontsize=7, frameon=False)
    figure.savefig(picture, dpi=150)
