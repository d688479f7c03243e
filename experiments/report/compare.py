"""Compares groups of seeds: which is better at equal steps and equal time, and by how much."""

import dataclasses
import glob
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plotly.subplots import make_subplots

from experiments import run, statistics, terminal
from experiments.config import all_seeds
from experiments.report import online, page, panels, source
from experiments.report.source import Source
from jmql.settings import ConfigError, flatten

_STAGES = ("return_pre", "return_post")
# Equal in all that is compared: else returns are of other tasks or another physics.
_SAME = ("task", "backend", "split", "tasks.seed", "tasks.held_out", "tasks.held_out_ranges")
_DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one seed earned at each evaluation."""

    seed: int
    steps: np.ndarray  # [E]
    seconds: np.ndarray  # [E]
    returns: dict[str, np.ndarray]  # of `_STAGES`, [E, K] of tasks, or [E, 1] of their means

    def at(self, reached: np.ndarray, limit: float) -> int:
        """Returns the last evaluation within a limit of steps or seconds; -1: there is none."""
        return int(np.searchsorted(reached, limit, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    name: str
    sources: list[Source]
    curves: list[Curve]

    def values(self, stage: str, by: str, limit: float) -> np.ndarray | None:
        """Returns what the seeds earned [S, K] when they had taken so many steps or seconds; None
        where one had no evaluation yet.
        """
        picked = [(curve, curve.at(getattr(curve, by), limit)) for curve in self.curves]
        if any(at < 0 for _, at in picked):
            return None
        return np.stack([curve.returns[stage][at] for curve, at in picked])

    def reach(self, by: str) -> float:
        """Returns up to which step or second all seeds have evaluations."""
        return min(float(getattr(curve, by)[-1]) for curve in self.curves)

    def means(self, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps that all seeds have, and means over seeds and tasks, [E] each."""
        common = set.intersection(*(set(curve.steps.tolist()) for curve in self.curves))
        steps = np.array(sorted(common))
        whole = [
            curve.returns[stage][np.isin(curve.steps, steps)].mean(axis=1) for curve in self.curves
        ]
        return steps, np.mean(whole, axis=0)


def folders(words: Sequence[str]) -> list[Path]:
    """Returns the run directories of paths and patterns; a folder stands for the runs in it.

    Raises:
        ConfigError: one of them has none.
    """
    found: dict[Path, None] = {}
    for word in words:
        paths = sorted(map(Path, glob.glob(word)))
        inside = [
            path
            for one in paths
            for path in ([one] if run.exists(one) else sorted(one.glob("*")))
            if run.exists(path)
        ]
        if not inside:
            raise ConfigError(
                f"{word} has no runs; valid: run directories, such as runs/ant_dir/*, or a folder"
                " of them"
            )
        found |= dict.fromkeys(inside)
    return list(found)


def _read(paths: Sequence[Path], left_out: list[str]) -> list[Source]:
    found = []
    for path in paths:
        try:
            found.append(source.read(path))
        except ConfigError as error:  # of another version, say
            left_out.append(str(error))
    if not found:
        raise ConfigError("; ".join(left_out))
    return found


def grouped(runs: Sequence[Source]) -> tuple[list[Group], list[str]]:
    """Returns the groups of runs in their order, and what is left out, and why.

    Raises:
        ConfigError: they cannot be compared.
    """
    left_out = [f"{it.folder} has no evaluation yet" for it in runs if not it.steps]
    sources = [it for it in runs if it.steps]
    if not sources:
        raise ConfigError(
            f"no run has an evaluation yet; {'; '.join(left_out)}; valid: one that has"
        )
    first = sources[0]
    refuse_other(first, sources)
    groups: dict[str, list[Source]] = {}
    for it in sources:
        groups.setdefault(run.group(it.config), []).append(it)
    names = _names([some[0] for some in groups.values()])
    result = []
    for name, some in zip(names, groups.values(), strict=True):
        curves = [curve for it in some for curve in _curves(it)]
        seeds = [curve.seed for curve in curves]
        for seed in sorted({x for x in seeds if seeds.count(x) > 1}):
            twice = [str(it.folder) for it in some if seed in all_seeds(it.config)]
            raise ConfigError(
                f"{' and '.join(twice)} are the same run of seed {seed}; valid: one of them"
            )
        if not set.intersection(*(set(curve.steps.tolist()) for curve in curves)):
            raise ConfigError(
                f"runs of {name} have no evaluation at a step in common; valid: seeds of one sweep"
            )
        result.append(Group(name, some, curves))
    return result, left_out


def refuse_other(first: Source, others: Sequence[Source]) -> None:
    """Raises ConfigError where returns do not compare."""
    mine = flatten(first.config)
    for it in others:
        theirs = flatten(it.config)
        for name in _SAME:
            if mine[name] != theirs[name]:
                raise ConfigError(
                    f"{it.folder} has {name} {theirs[name]!r}, and {first.folder} {mine[name]!r}:"
                    f" their returns do not compare; valid: runs of one {name}"
                )
        tasks = it.parameters("held_out"), first.parameters("held_out")
        same = tasks[0].keys() == tasks[1].keys() and all(
            np.array_equal(leaf, tasks[1][name]) for name, leaf in tasks[0].items()
        )
        if not same:
            raise ConfigError(
                f"{it.folder} has other held-out tasks than {first.folder}: their returns do not"
                " compare; valid: runs on the same"
            )


def _curves(it: Source) -> list[Curve]:
    seconds = it.seconds
    found = []
    for i, seed in enumerate(all_seeds(it.config)):
        returns: dict[str, list[np.ndarray]] = {stage: [] for stage in _STAGES}
        for steps in it.steps:
            for stage, read in zip(_STAGES, ("return_pre", it.last), strict=True):
                values = it.values(f"tasks/{read}", steps)
                if values is None:
                    values = it.values(f"eval/{read}", steps)
                assert values is not None
                returns[stage].append(np.atleast_1d(values[i]))
        found.append(
            Curve(
                seed,
                np.array(it.steps),
                np.array([seconds[steps] for steps in it.steps]),
                {stage: np.stack(values) for stage, values in returns.items()},
            )
        )
    return found


def differing(sources: Sequence[Source]) -> list[str]:
    """Returns the settings in which groups differ, but for seeds and places."""
    flat = [run.but_for_seeds(it.config) for it in sources]
    return [name for name in flat[0] if any(one[name] != flat[0][name] for one in flat)]


def _names(sources: Sequence[Source]) -> list[str]:
    """Returns what groups are called: what they differ in, such as `tau 0.01`."""
    read = [{*it.config.read} for it in sources]
    keys = [key for key in differing(sources) if all(key in names for names in read)]
    short = [key.rpartition(".")[2] for key in keys]
    called = [key if short.count(name) > 1 else name for key, name in zip(keys, short, strict=True)]
    names = []
    for it in sources:
        flat = flatten(it.config)
        said = [f"{name} {flat[key]}" for key, name in zip(keys[:3], called, strict=False)]
        names.append(", ".join(said) or it.folder.name)
    if len(set(names)) < len(names):  # they differ in more
        return [f"{name} ({it.folder.name})" for name, it in zip(names, sources, strict=True)]
    return names


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
    runs = online.read(wandb) if wandb else _read(folders(words), left_out)
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
