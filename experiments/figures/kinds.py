"""Draws what adaptation to a kind of object brings that was held out, and which it reuses."""

import json
from pathlib import Path

import numpy as np

from envs.arm import KINDS
from experiments.figures import adaptation

RESULTS = Path("experiments/results/arm/studies")
_USED = "#c2410c"


def reuse(rows: adaptation.Rows) -> np.ndarray:
    """Returns how many times its share of the training tasks each kind has of the weights of
    replay, [kinds], in the mean over seeds and new tasks; NaN where no seed has a task of the kind.
    """
    shares = []
    for row in rows:
        kinds = np.array(row["train_tasks"]["kind"]).astype(int)
        weights = np.mean(row["tasks/reuse"], axis=0)
        shares.append([_times(weights[kinds == k], len(kinds)) for k in range(len(KINDS))])
    return np.ma.masked_invalid(shares).mean(axis=0).filled(np.nan)


def _times(weights: np.ndarray, of: int) -> float:
    return float(weights.mean() * of) if len(weights) else np.nan


def draw(picture: Path) -> None:
    """Draws a column a kind that was held out."""
    import matplotlib.pyplot as plt

    size = (2.6 * len(KINDS), 4.8)
    figure, axes = plt.subplots(
        2, len(KINDS), figsize=size, layout="constrained", height_ratios=(3, 2)
    )
    for column, kind in zip(axes.T, KINDS, strict=True):
        path = RESULTS / f"no_{kind}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        adaptation.draw_shots(column[0], rows)
        column[0].set_title(f"{kind}, held out", fontsize=10)
        times = reuse([row for row in rows if row["adapted"] == "as set"])
        column[1].barh(range(len(KINDS)), times, color=_USED, height=0.6)
        column[1].axvline(1.0, color="#94a3b8", linewidth=0.8)
        column[1].set_yticks(range(len(KINDS)), KINDS)
        column[1].invert_yaxis()
        column[1].set_xlabel("reuse over even reuse", fontsize=8)
        for axis in column:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("return on new objects", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(picture, dpi=150)
