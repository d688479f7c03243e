"""Charts of a run: each function returns a figure, or None where the run says nothing of it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import envs
from experiments import statistics
from experiments.report.source import AS_SET, Row, Source, finite, sides_of
from experiments.terminal import called

# After Okabe and Ito, whose colours all eyes tell apart, on white and on black; lines differ in
# dashes and points in shape, too.
BEFORE, AFTER = "#2f8fd8", "#d55e00"
COLORS = (BEFORE, AFTER, "#009e73", "#cc79a7", "#e69f00", "#8a8a8a")
_MARKS = ((BEFORE, "circle-open"), (AFTER, "diamond"))
DASHES = ("dash", "solid", "dot", "dashdot", "longdash", "longdashdot")
_BINS = 64  # rows and columns of a map, at the most


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


# Parameters of tasks [K, ...], and returns [S, K] by what first and last stages are called.
OfTasks = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def final_tasks(source: Source) -> OfTasks | None:
    """Returns the held-out tasks, and their returns at the last step."""
    for steps in reversed(source.steps):
        found = {stage: source.values(f"tasks/{stage}", steps) for stage in ends(source)}
        if all(values is not None for values in found.values()):
            return source.parameters("held_out"), _by_name(source, found)
    return None


def study_tasks(source: Source) -> OfTasks | None:
    """Returns the same of the newest `make evaluate`."""
    rows = as_set(source)
    if not rows or not all(f"tasks/{stage}" in row for row in rows for stage in ends(source)):
        return None
    parameters = {k: np.array(v) for k, v in rows[0].get("tasks/parameters", {}).items()}
    found = {stage: np.array([row[f"tasks/{stage}"] for row in rows]) for stage in ends(source)}
    return parameters, _by_name(source, found)


def ends(source: Source) -> list[str]:
    """Returns the first stage that is reported, and the last, if there is another."""
    return list(dict.fromkeys(("return_pre", source.last)))


def _by_name(source: Source, found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {called(source.config, stage): values for stage, values in found.items()}


def as_set(source: Source) -> list[Row]:
    """Returns the rows of the newest study as the run adapts, a row for each seed."""
    return [row for row in source.studies if row["adapted"] == AS_SET]


def by_task(source: Source, found: OfTasks | None) -> go.Figure | None:
    """Returns first and last stage over the parameter of a task: an angle in a circle, a place on
    the plane, a number along an axis; else over the tasks as they come.
    """
    if found is None:
        return None
    parameters, seeds = found
    returns = {stage: values.mean(0) for stage, values in seeds.items()}
    leaf = next(iter(parameters.values())) if len(parameters) == 1 else np.zeros(())
    (name, *_) = (*parameters, "task")
    if leaf.ndim == 2 and leaf.shape[1] == 2:
        return _on_the_plane(source, name, leaf, returns)
    if leaf.ndim == 1 and name == "angle":
        return _on_a_circle(leaf, returns)
    figure = go.Figure()
    for (stage, of_seeds), (color, symbol) in zip(seeds.items(), _MARKS, strict=False):
        spread, values = {}, returns[stage]
        x = leaf if leaf.ndim == 1 else np.arange(len(values))
        if len(of_seeds) > 1:
            ends = of_seeds.max(0) - values, values - of_seeds.min(0)
            spread = {"error_y": dict(array=finite(ends[0]), arrayminus=finite(ends[1]))}
        figure.add_scatter(
            x=finite(x),
            y=finite(values),
            name=stage,
            mode="markers",
            marker=dict(color=color, symbol=symbol, size=8),
            **spread,
        )
    figure.update_xaxes(title_text=_meaning(source, name) if leaf.ndim == 1 else "held-out task")
    figure.update_yaxes(title_text="return")
    return sized(figure, 380)


def _meaning(source: Source, parameter: str) -> str:
    """Returns what a parameter says, as far as its family is here."""
    try:
        return envs.load(source.config.task).parameters.get(parameter, parameter)
    except ValueError:
        return parameter


def _on_a_circle(angles: np.ndarray, returns: dict[str, np.ndarray]) -> go.Figure:
    figure = go.Figure()
    turn = np.argsort(angles)
    for (stage, values), (color, symbol) in zip(returns.items(), _MARKS, strict=False):
        figure.add_scatterpolar(
            theta=finite(np.degrees(angles[turn])),
            r=finite(values[turn]),
            name=stage,
            mode="markers",
            marker=dict(color=color, symbol=symbol, size=10),
        )
    low, high = _ends(returns)
    figure.update_polars(
        radialaxis=dict(range=[min(0.0, low), max(0.0, 1.05 * high)], angle=45, nticks=5),
        bgcolor="rgba(0,0,0,0)",
    )
    return sized(figure, 460)


def _ends(returns: dict[str, np.ndarray]) -> tuple[float, float]:
    """Returns the lowest and the highest return that are finite."""
    values = np.concatenate(list(returns.values()))
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _on_the_plane(
    source: Source, name: str, places: np.ndarray, returns: dict[str, np.ndarray]
) -> go.Figure:
    figure = make_subplots(
        1, len(returns), shared_yaxes=True, subplot_titles=list(returns), horizontal_spacing=0.04
    )
    trained = source.parameters("train").get(name)
    low, high = _ends(returns)
    figure.update_xaxes(title_text=f"{name}, x")
    figure.update_yaxes(title_text=f"{name}, y", col=1)
    for column, values in enumerate(returns.values(), 1):
        if trained is not None and trained.ndim == 2:
            figure.add_scatter(
                x=finite(trained[:, 0]),
                y=finite(trained[:, 1]),
                name="training tasks",
                mode="markers",
                marker=dict(color="#888888", symbol="x-thin-open", size=5),
                showlegend=column == 1,
                hoverinfo="skip",
                row=1,
                col=column,
            )
        figure.add_scatter(
            x=finite(places[:, 0]),
            y=finite(places[:, 1]),
            name="held-out tasks, by return",
            mode="markers",
            marker=dict(
                color=finite(np.where(np.isfinite(values), values, low)),
                cmin=low,
                cmax=high,
                colorscale="Viridis",
                size=12,
                colorbar=dict(title="return") if column == 2 else None,
                showscale=column == 2,
            ),
            text=[f"{x:.1f}" for x in values],
            hovertemplate="(%{x:.2f}, %{y:.2f}): %{text}<extra></extra>",
            showlegend=column == 1,
            row=1,
            col=column,
        )
    figure.update_yaxes(scaleanchor="x", scaleratio=1, col=1)
    return sized(figure, 420)


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


def reuse(source: Source) -> go.Figure | None:
    """The share of each training task in the weights, for each new task, both sorted."""
    needed = {"tasks/reuse", "train_tasks", "tasks/parameters"}
    rows = [row for row in as_set(source) if row.keys() >= needed]
    if not rows:
        return None
    shares = np.mean([np.array(row["tasks/reuse"], float) for row in rows], axis=0)
    if not np.isfinite(shares).any():
        return None
    labels = []
    for axis, name in enumerate(("tasks/parameters", "train_tasks")):
        numbers = np.column_stack(
            [np.reshape(leaf, (shares.shape[axis], -1)) for leaf in rows[0][name].values()]
        )
        key, said = numbers[:, 0], next(iter(rows[0][name]))
        if len(rows[0][name]) == 1 and numbers.shape[1] == 2:  # around the circle
            key, said = np.degrees(np.arctan2(numbers[:, 1], numbers[:, 0])), "direction (degrees)"
        elif numbers.shape[1] > 1:
            centred = numbers - numbers.mean(0)
            key = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
            said = "first principal component of their parameters"
        turn = np.argsort(key, kind="stable")
        shares = np.take(shares, turn, axis=axis)
        bins = np.array_split(np.arange(len(turn)), min(len(turn), _BINS))
        parts = [np.take(shares, part, axis=axis).mean(axis=axis) for part in bins]
        shares = np.stack(parts, axis=axis)
        labels.append([f"{key[turn][part].mean():.2f} ({i + 1})" for i, part in enumerate(bins)])
    figure = go.Figure(
        go.Heatmap(
            z=[finite(row) for row in shares.round(5)],
            x=labels[1],
            y=labels[0],
            colorscale="Cividis",
            colorbar=dict(title="share"),
        )
    )
    figure.update_xaxes(title_text=f"training tasks, by {said} (place in that order)")
    figure.update_yaxes(title_text="new tasks, likewise")
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(type="category", nticks=8, automargin=True)
    return sized(figure, 460, legend=False)


def context(source: Source) -> go.Figure | None:
    """The context in its first two principal components over the steps of an episode."""
    episodes = source.episodes
    if "context" not in episodes or episodes["context"].shape[-1] < 2:
        return None
    values, alive = episodes["context"][:, 0], episodes["alive"][:, 0]  # before adaptation
    lived = values[alive & np.isfinite(values).all(-1)]
    if len(lived) < 2:
        return None
    middle = lived.mean(0)
    _, sizes, ways = np.linalg.svd(lived - middle, full_matrices=False)
    parts = sizes**2 / max(float((sizes**2).sum()), 1e-12)
    colors = _along(source, len(values))
    figure = go.Figure()
    for i, name in enumerate(episodes["names"]):
        path = ((values[i] - middle) @ ways[:2].T)[alive[i]]
        symbol = ("circle", "diamond", "square", "cross")[i % 4]
        figure.add_scatter(
            x=finite(path[:, 0]),
            y=finite(path[:, 1]),
            name=str(name),
            mode="lines+markers",
            line=dict(color=colors[i], width=1),
            marker=dict(color=colors[i], symbol=symbol, size=[9, *[3] * (len(path) - 1)]),
            text=[f"step {step}" for step in range(len(path))],
        )
    figure.update_xaxes(title_text=f"first component ({parts[0]:.0%} of the variance)")
    figure.update_yaxes(title_text=f"second ({parts[1]:.0%})")
    return sized(figure, 460)


def paths(source: Source) -> go.Figure | None:
    """Where the body goes, before and after adaptation, from the same start: seen from above, or
    over time where it can only go along x.
    """
    episodes = source.episodes
    if "place" not in episodes:
        return None
    sides = sides_of(episodes)
    figure = make_subplots(
        1, len(sides), shared_yaxes=True, subplot_titles=sides, horizontal_spacing=0.04
    )
    colors = _along(source, len(episodes["place"]))
    goals = episodes.get("task/goal")
    flat = not np.ptp(episodes["place"][..., 1])
    time = np.arange(episodes["place"].shape[2]) * (float(episodes["dt"]) or 1.0)
    for i, name in enumerate(episodes["names"]):
        for column in range(1, 1 + len(sides)):
            path = episodes["place"][i, column - 1][episodes["alive"][i, column - 1]]
            figure.add_scatter(
                x=finite(time[: len(path)] if flat else path[:, 0]),
                y=finite(path[:, 0 if flat else 1]),
                name=str(name),
                mode="lines",
                line=dict(color=colors[i], dash=DASHES[i % 4]),
                legendgroup=str(name),
                showlegend=column == 1,
                row=1,
                col=column,
            )
            if goals is not None:
                figure.add_scatter(
                    x=finite(goals[i, :1]),
                    y=finite(goals[i, 1:2]),
                    name=f"goal {name}",
                    mode="markers",
                    marker=dict(color=colors[i], symbol="star", size=12),
                    legendgroup=str(name),
                    showlegend=False,
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title_text="time (s)" if flat else "x (m)")
    figure.update_yaxes(title_text="x (m)" if flat else "y (m)", col=1)
    if not flat:
        figure.update_yaxes(scaleanchor="x", scaleratio=1, col=1)
    return sized(figure, 440)


def _along(source: Source, count: int) -> list[str]:
    """Returns a colour for each task that was played, in the order of their first parameter."""
    leaves = [v for k, v in source.episodes.items() if k.startswith("task/")]
    first = np.column_stack([leaf.reshape(count, -1) for leaf in leaves])
    key = np.arctan2(first[:, 1], first[:, 0]) if first.shape[1] == 2 else first[:, 0]
    rank = np.argsort(np.argsort(key, kind="stable"))
    from plotly.colors import sample_colorscale

    return list(sample_colorscale("Turbo", (0.08 + 0.84 * rank / max(1, count - 1)).tolist()))


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
    if not any(source.curve(name)[0] for name in names):
        return None
    rows = len(names) // 2
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
