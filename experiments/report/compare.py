"""Compares groups of seeds: which is better at equal steps and equal time, and by how much."""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plotly.subplots import make_subplots

from experiments import statistics, terminal
from experiments.report import online, page, panels
from experiments.report.groups import Group, differing, folders, grouped, read
from experiments.report.source import Source
from jmql.settings import ConfigError, flatten

_DRAWS = 2000


def probability_of_improvement(
    ours: np.ndarray, theirs: np.ndarray
) -> tuple[float, tuple[float, float]]:
    """Returns how probable it is that a seed of ours earns more than one of theirs on a task, and
    its 95 % interval (Agarwal et al. 2021).

    Args:
        ours: [S, K] returns of seeds on tasks.
        theirs: [R, K], on the same tasks.
    """

    def share(one: np.ndarray, other: np.ndarray) -> float:
        better = one[:, None] > other[None]
        return float((better + 0.5 * (one[:, None] == other[None])).mean())

    rng, found = np.random.default_rng(0), []
    for _ in range(_DRAWS):
        tasks = rng.integers(ours.shape[1], size=ours.shape[1])
        some = (x[rng.integers(len(x), size=(len(x), 1)), tasks] for x in (ours, theirs))
        found.append(share(*some))
    low, high = np.quantile(found, (0.025, 0.975))
    return share(ours, theirs), (float(low), float(high))


Middle = tuple[float, float, float]  # an interquartile mean, or a probability, and its interval


@dataclasses.dataclass(frozen=True)
class Line:
    """What the table says of a group."""

    name: str
    seeds: int
    before: Middle | None  # before adaptation, at the steps
    at_steps: Middle | None  # after adaptation
    at_seconds: Middle | None
    improvement: Middle | None  # probability of it over the first group, at the steps
    best: float  # mean over seeds and tasks of the best evaluation up to the steps
    steps: int  # that all its seeds have
    seconds_to_target: float | None
    speed: float  # environment steps a second, of a seed
    compiling: float  # seconds, median


def lines(groups: Sequence[Group], steps: float, seconds: float, target: float) -> list[Line]:
    """Returns the table.

    Args:
        groups: what is compared.
        steps: at which returns are compared.
        seconds: likewise.
        target: a return after adaptation that is waited for.
    """
    found = []
    for group in groups:
        after = group.values("return_post", "steps", steps)
        first = groups[0].values("return_post", "steps", steps)
        improvement = None
        if group is not groups[0] and after is not None and first is not None:
            better, ends = probability_of_improvement(after, first)
            improvement = better, *ends
        at, means = group.means("return_post")
        rows = [row for it in group.sources for row in it.rows]
        found.append(
            Line(
                group.name,
                len(group.curves),
                _with_interval(group.values("return_pre", "steps", steps)),
                _with_interval(after),
                _with_interval(group.values("return_post", "seconds", seconds)),
                improvement,
                float(means[at <= steps].max(initial=-np.inf)),
                int(group.reach("steps")),
                _reached(group, target),
                float(np.median([row["time/env_steps_per_second"] for row in rows])),
                float(np.median([row["time/compile_seconds"] for row in rows])),
            )
        )
    return found


def _with_interval(values: np.ndarray | None) -> Middle | None:
    if values is None:
        return None
    middle = float(statistics.interquartile_mean(values.ravel()))
    return middle, *statistics.interval(values, statistics.interquartile_mean)


def _reached(group: Group, target: float) -> float | None:
    """Returns seconds until the mean over seeds is first at a return, of their mean clock."""
    steps, means = group.means("return_post")
    if not (means >= target).any():
        return None
    at = steps[int(np.argmax(means >= target))]
    return _clock(group, at)


def _clock(group: Group, steps: int) -> float:
    """Returns the seconds until some steps, mean over seeds."""
    return float(np.mean([curve.seconds[curve.steps == steps][0] for curve in group.curves]))


def cautions(groups: Sequence[Group], steps: float) -> list[str]:
    """Returns what must be known of a comparison to read it right."""
    said = []
    few = [f"{group.name} ({len(group.curves)})" for group in groups if len(group.curves) < 3]
    if few:
        said.append(
            f"fewer than three seeds: {', '.join(few)}; their intervals hardly say what other"
            " seeds would earn"
        )
    sources = [it for group in groups for it in group.sources]
    devices = {_device(it) for it in sources}
    if len(devices) > 1:
        said.append(f"times do not compare, they are of {', '.join(sorted(devices))}")
    versions = {it.record.get("versions", {}).get("jax", "?") for it in sources}
    if len(versions) > 1:
        said.append(f"versions of JAX differ: {', '.join(sorted(versions))}")
    flat = [flatten(group.sources[0].config) for group in groups]
    for name in ("adapt.shots", "adapt.episodes"):
        if len({one[name] for one in flat}) > 1:
            said.append(f"{name} differs: 'after' is after more new data in some groups")
    for group in groups:
        config = group.sources[0].config
        if config.context_span == "trial":
            said.append(f"{group.name}: 'after' is episode {config.p3o.trial_episodes} of a trial")
        elif config.algorithm == "p3o":
            said.append(f"{group.name} does not adapt: 'after' is 'before'")
    shortest = min(groups, key=lambda group: group.reach("steps"))
    if any(group.reach("steps") > steps for group in groups):
        said.append(f"compared at {steps:,.0f} steps, where {shortest.name} is")
    return said


def _device(it: Source) -> str:
    record = it.record
    return f"{record.get('platform')} {record.get('device')} x{record.get('device_count')}"


def compare(words: Sequence[str], wandb: str, out: Path, target: float | None) -> None:
    """Prints a table of groups and writes the same as a page, with curves.

    Args:
        words: paths and patterns of run directories.
        wandb: ENTITY/PROJECT or ENTITY/PROJECT/GROUP of W&B, in place of them; or empty.
        out: the page.
        target: a return to wait for; by default the highest that all groups have reached.

    Raises:
        ConfigError: these runs do not compare.
        RunFailed: the page cannot be written.
    """
    if bool(words) == bool(wandb):
        raise ConfigError(
            'runs and wandb: one of the two must be given; valid: RUNS="runs/ant_dir/*", or'
            " WANDB=ENTITY/PROJECT"
        )
    left_out: list[str] = []
    runs = online.read(wandb) if wandb else read(folders(words), left_out)
    groups, without = grouped(runs)
    left_out += without
    steps = min(group.reach("steps") for group in groups)
    seconds = min(group.reach("seconds") for group in groups)
    target = min(x.means("return_post")[1].max() for x in groups) if target is None else target
    table = lines(groups, steps, seconds, float(target))
    config = groups[0].sources[0].config
    many = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
    title = f"{config.task} on {config.backend}: {many}, {steps:,.0f} steps"
    columns, cells = _cells(table, steps, seconds, float(target))
    shown = [1, 3, 4, 5, 6, 7]  # as many as fit
    numbers = [str(i + 1) for i in range(len(cells))]
    terminal.table(
        f"{title}: interquartile mean after adaptation, with 95 % intervals",
        [columns[i] for i in shown],
        [(x, [row[i] for i in shown]) for x, row in zip(numbers, cells, strict=True)],
    )
    for number, row in zip(numbers, cells, strict=True):
        terminal.console.print(f"{number}: {row[0]}", soft_wrap=True)
    keys = differing([group.sources[0] for group in groups])
    notes = [*cautions(groups, steps), *(f"left out: {text}" for text in left_out)]
    for text in notes:
        terminal.console.print(text, soft_wrap=True)
    page.write(
        out,
        title,
        f"runs: {wandb or ' '.join(words)}",
        _parts(groups, columns, cells, keys, notes),
    )
    terminal.console.print(f"written to {out}", soft_wrap=True)


def _cells(
    table: Sequence[Line], steps: float, seconds: float, target: float
) -> tuple[list[str], list[list[str]]]:
    columns = [
        "",
        "seeds",
        "before",
        f"after {steps:,.0f} steps",
        f"after {terminal.human_time(seconds)}",
        "P(better)",
        "best so far",
        f"time to {target:.1f}",
        "steps/s",
        "compiling",
        "steps done",
    ]
    cells = []
    for line in table:
        better = line.improvement
        cells.append(
            [
                line.name,
                str(line.seeds),
                _interval(line.before),
                _interval(line.at_steps),
                _interval(line.at_seconds),
                "" if better is None else f"{better[0]:.2f}\n[{better[1]:.2f}, {better[2]:.2f}]",
                f"{line.best:.1f}" if np.isfinite(line.best) else "",
                "never"
                if line.seconds_to_target is None
                else terminal.human_time(line.seconds_to_target),
                f"{line.speed:,.0f}",
                f"{line.compiling:.0f} s",
                f"{line.steps:,}",
            ]
        )
    return columns, cells


def _interval(values: Middle | None) -> str:
    if values is None:
        return "none yet"
    middle, low, high = values
    digits = 0 if max(map(abs, (low, high))) >= 100 else 1
    return f"{middle:.1f}\n[{low:.{digits}f}, {high:.{digits}f}]"


def _parts(
    groups: Sequence[Group],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    keys: Sequence[str],
    notes: Sequence[str],
) -> list[str]:
    flat = [flatten(group.sources[0].config) for group in groups]
    settings = [[key, *(str(one[key]) for one in flat)] for key in keys]
    runs = [[group.name, str(it.folder), it.state] for group in groups for it in group.sources]
    warnings = "".join(f'<p class="warning">{html.escape(text)}.</p>' for text in notes)
    return [
        warnings,
        page.section(
            "Which is better",
            "Interquartile means over seeds and tasks with 95 % bootstrap intervals over both, at"
            " equal environment steps and at equal time of training, without compilation; how"
            " probable it is, at equal steps, that a seed earns more than one of the first group on"
            " a task (0.5: no difference). The best is the mean of the best evaluation up to those"
            " steps. All but 'before' is after adaptation.",
            page.table(columns, cells),
        ),
        page.section(
            "Curves",
            "Means over seeds and tasks after adaptation, with 95 % intervals.",
            page.chart(_overlaid(groups), "Return on held-out tasks over training"),
        ),
        page.section(
            "Settings that differ", "", page.table(["setting", *(x.name for x in groups)], settings)
        ),
        page.section("Runs", "", page.table(["group", "run", "state"], runs)),
    ]


def _overlaid(groups: Sequence[Group]) -> object:
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03)
    for i, group in enumerate(groups):
        steps, means = group.means("return_post")
        ends = [
            statistics.interval_of_mean(values)
            for at in steps
            if (values := group.values("return_post", "steps", at)) is not None
        ]
        band = [low for low, _ in ends], [high for _, high in ends]
        clock = [_clock(group, at) / 60 for at in steps]
        for column, x in ((1, steps.tolist()), (2, [float(x) for x in clock])):
            panels.add_curve(figure, i, group.name, x, means.tolist(), band, column)
    figure.update_xaxes(title_text="environment steps", col=1)
    figure.update_xaxes(title_text="minutes", col=2)
    figure.update_yaxes(title_text="return after adaptation", col=1)
    return panels.sized(figure, 460)
