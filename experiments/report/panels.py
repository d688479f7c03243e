"""Charts of a run over training: a figure each, or None where the run says nothing of it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from experiments import statistics
from experiments.report.source import AS_SET, Row, Source, finite
from experiments.terminal import called

# After Okabe and Ito, whose colours all eyes tell apart, on white and on black; lines differ in
# dashes and points in shape, too.
BEFORE, AFTER = "#2f8fd8", "#d55e00"
COLORS = (BEFORE, AFTER, "#009e73", "#cc79a7", "#e69f00", "#8a8a8a")
DASHES = ("dash", "solid", "dot", "dashdot", "longdash", "longdashdot")


# What a stage looks like, everywhere; shots between the first and the last have what is left.
_LOOKS = {"pre": 0, "post": 1, "step1": 2}


def stages(source: Source) -> list[str]:
    """Returns the stages that rows report, `return_pre` first; step 1 only where there is one."""
    names = {
        name.removeprefix("eval/")
        for row in source.rows
        for name in row
        if name.startswith("eval/return_") and not name.endswith("_p20")
    }
    if not source.config.adapt.step1_updates:
        names.discard("return_step1")
    return sorted(names, key=_turn)


def _turn(name: str) -> tuple[int, int]:
    """Sorts stages as they come."""
    short = name.rpartition("_")[2]
    order = {"pre": 0, "step1": 1, "post": 3}
    found = re.fullmatch(r"(?:shot|episode)(\d+)", short)
    return (2, int(found[1])) if found else (order.get(short, 4), 0)


Point = tuple[int, float, float, float]  # steps or shots, a mean, and its 95 % interval


def over_seeds(source: Source, stage: str, over: str = "") -> list[Point]:
    """Returns steps, the mean over seeds and tasks, and its interval: of the return of a stage, or
    of what it gained over another, on the same tasks of the same seeds.
    """
    found = []
    for steps in source.steps:
        whole = _of_tasks(source, stage, steps)
        if whole is not None and over:
            other = _of_tasks(source, over, steps)
            whole = None if other is None or other.shape != whole.shape else whole - other
        if whole is not None:
            low, high = statistics.interval_of_mean(whole)
            found.append((steps, float(whole.mean()), low, high))
    return found


def _of_tasks(source: Source, stage: str, steps: int) -> np.ndarray | None:
    """Returns returns [S, K] of single tasks, or [S, 1] of all."""
    of_tasks = source.values(f"tasks/{stage}", steps)
    if of_tasks is not None:
        return of_tasks
    values = source.values(f"eval/{stage}", steps)
    return None if values is None else values[:, None]


def learning(source: Source) -> go.Figure | None:
    """Returns over environment steps and over minutes, before and after adaptation."""
    if not source.steps:
        return None
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03)
    minutes = {steps: seconds / 60 for steps, seconds in source.seconds.items()}
    for i, stage in enumerate(stages(source)):
        curve = over_seeds(source, stage)
        if not curve:
            continue
        look = _LOOKS.get(stage.removeprefix("return_"), 3 + i)
        steps, means, lows, highs = map(list, zip(*curve, strict=True))
        for column, x in ((1, steps), (2, [minutes.get(step) for step in steps])):
            add_curve(figure, look, called(source.config, stage), x, means, (lows, highs), column)
    figure.update_xaxes(title_text="environment steps", col=1)
    figure.update_xaxes(title_text="minutes", col=2)
    figure.update_yaxes(title_text="return on held-out tasks", col=1)
    return sized(figure, 420)


def gain(source: Source) -> go.Figure | None:
    """What adaptation adds on the same tasks of the same seeds, over training."""
    points = over_seeds(source, "return_post", over="return_pre")
    if not points:
        return None
    last, first = (called(source.config, stage) for stage in ("return_post", "return_pre"))
    figure = make_subplots(1, 1)
    steps, means, lows, highs = map(list, zip(*points, strict=True))
    add_curve(figure, 2, f"{last} minus {first}", steps, means, (lows, highs))
    figure.update_xaxes(title_text="environment steps")
    figure.update_yaxes(title_text="gain of return", zeroline=True, zerolinewidth=2)
    return sized(figure, 300, legend=False)


def add_curve(
    figure: go.Figure,
    index: int,
    name: str,
    x: Sequence[Any],
    y: Sequence[Any],
    band: tuple[Sequence[float], Sequence[float]],
    column: int = 1,
) -> None:
    """Adds a line with its band to a figure; it is named once."""
    color, dash = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*finite(band[1]), *reversed(finite(band[0]))],
        mode="lines",
        fill="toself",
        fillcolor=_faint(color),
        line_width=0,
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
        row=1,
        col=column,
    )
    figure.add_scatter(
        x=list(x),
        y=finite(y),
        name=name,
        mode="lines+markers",
        line=dict(color=color, dash=dash),
        marker=dict(size=4),
        legendgroup=name,
        showlegend=column == 1,
        row=1,
        col=column,
    )


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def sized(figure: go.Figure, height: int, legend: bool = True) -> go.Figure:
    """Sets what all charts have in common."""
    figure.update_layout(
        height=height,
        margin=dict(l=60, r=15, t=40, b=110 if legend else 50),
        legend=dict(orientation="h", y=-65 / (height - 190), yanchor="top", x=0),
        showlegend=legend,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure


def as_set(source: Source) -> list[Row]:
    """Returns the rows of the newest study as the run adapts, a row for each seed."""
    return [row for row in source.studies if row["adapted"] == AS_SET]


def shots(source: Source) -> go.Figure | None:
    """Interquartile means by shots of new data, for each way to adapt of the newest study."""
    ways: dict[str, list[Row]] = {}
    for row in source.studies:
        ways.setdefault(row["adapted"], []).append(row)
    figure = make_subplots(1, 1)
    for i, (name, rows) in enumerate(ways.items(), 1):  # as set: as what is adapted elsewhere
        points = by_shots(rows)
        if len(points) < 2:  # an oracle: a level
            continue
        x, y, lows, highs = map(list, zip(*points, strict=True))
        add_curve(figure, i, name, x, y, (lows, highs))
    if not figure.data:
        return None
    # Its scale would hide the others'.
    figure.update_traces(visible="legendonly", selector=dict(legendgroup="from nothing"))
    figure.update_xaxes(title_text="episodes of new data")
    figure.update_yaxes(title_text="return (interquartile mean)")
    return sized(figure, 380)


def by_shots(rows: Sequence[Row]) -> list[Point]:
    """Returns episodes of new data, the interquartile mean over seeds and tasks, its interval."""
    each = rows[0].get("measured", {}).get("adapt.episodes", 1)
    names = [
        name for name in rows[0] if name.startswith("tasks/return_") and not name.endswith("step1")
    ]
    points = []
    for shot, name in enumerate(sorted(names, key=_turn)):
        if all(name in row for row in rows):
            values = np.array([row[name] for row in rows], float)
            low, high = statistics.interval(values, statistics.interquartile_mean)
            middle = float(statistics.interquartile_mean(values.ravel()))
            points.append((shot * each, middle, low, high))
    return points


def propensity(source: Source) -> go.Figure | None:
    """What adaptation found in replay, over training: share that counts, weights, classifier."""
    if not source.curve("adapt/ess")[0]:
        return None
    titles = ("effective sample size", "weights", "share of weights that are zero", "classifier")
    figure = make_subplots(2, 2, subplot_titles=titles, vertical_spacing=0.2)

    def add(name: str, label: str, row: int, col: int, index: int) -> None:
        x, y = source.curve(f"adapt/{name}")
        line = dict(color=COLORS[index], dash=DASHES[index])
        trace = go.Scatter(x=x, y=finite(y), name=label, line=line, mode="lines+markers")
        trace.marker.size = 4
        figure.add_trace(trace, row=row, col=col)

    add("ess", "effective sample size (of 1)", 1, 1, 0)
    for i, (name, label) in enumerate(
        (("beta_p10", "10th"), ("beta_p50", "50th"), ("beta_p90", "90th percentile"))
    ):
        add(name, f"weight, {label}", 1, 2, (2, 3, 4)[i])
    add("beta_zero_share", "weights that are zero", 2, 1, 5)
    add("classifier_accuracy", "accuracy", 2, 2, 1)
    add("classifier_calibration_error", "calibration error", 2, 2, 0)
    for row, col in ((1, 1), (2, 1), (2, 2)):
        figure.update_yaxes(range=[0, 1.02], row=row, col=col)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text="environment steps", row=2)
    return sized(figure, 600)


def health(source: Source) -> go.Figure | None:
    """Losses, values and returns of training itself."""
    names = {
        "collect/return": "return while collecting",
        "train/critic_loss": "critic loss",
        "train/q": "mean Q",
        "train/weight_norm": "norm of all weights",
    }
    if source.config.algorithm == "p3o":
        names = {
            "collect/return": "return while collecting",
            "train/ess": "effective sample size of replay",
            "train/kl": "KL divergence from the past",
            "train/entropy": "entropy",
            "train/value_loss": "value loss",
            "train/weight_norm": "norm of all weights",
        }
    if source.config.network.task_head:
        names["train/task_loss"] = "loss of the head that tells the task"
    if not any(source.curve(name)[0] for name in names):
        return None
    rows = -(-len(names) // 2)
    figure = make_subplots(
        rows, 2, subplot_titles=list(names.values()), vertical_spacing=0.4 / rows
    )
    for i, (name, label) in enumerate(names.items()):
        x, y = source.curve(name)
        line = dict(color=COLORS[i], dash=DASHES[1])
        place = dict(row=i // 2 + 1, col=i % 2 + 1)
        figure.add_scatter(x=x, y=finite(y), name=label, line=line, mode="lines", **place)
    figure.update_xaxes(title_text="environment steps", row=rows)
    return sized(figure, 260 * rows, legend=False)
