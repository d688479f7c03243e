"""Charts of single tasks, as `panels` has those over training: returns, reuse, contexts, paths."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import envs
from experiments.report.panels import AFTER, BEFORE, DASHES, as_set, sized
from experiments.report.source import Source, finite, sides_of
from experiments.terminal import called

_MARKS = ((BEFORE, "circle-open"), (AFTER, "diamond"))
_BINS = 64  # rows and columns of a map, at the most

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
