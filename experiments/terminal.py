"""What the user sees: the header, the progress bar and the final table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from envs.base import Environment
from experiments import memory
from experiments.population import differing
from experiments.program import Program
from jmql.config import Config
from jmql.types import Task

_STEP1 = "return_step1"

# Episodes whose physics was not finite, in training and in evaluation, and adaptations whose
# weights were not.
TROUBLES = ("collect/blew_up", "eval/blew_up", "adapt/failed")

# What is printed is shown as it is: paths may look like markup.
console = Console(highlight=False, markup=False, emoji=False)


def human_time(seconds: float) -> str:
    """Returns a duration for people, such as `9:32` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Numbers(ProgressColumn):
    """Steps, returns, speed and time left, once the first cycle has been measured."""

    def render(self, task: Any) -> Text:
        shown = f"{task.completed:,.0f}/{task.total:,.0f} steps"
        if task.fields:
            shown += (
                f" · return {' → '.join(f'{x:.1f}' for x in task.fields['returns'])}"
                f" · {task.fields['updates']:.0f} upd/s"
            )
            if task.fields["left"] is not None:
                shown += f" · {human_time(task.fields['left'])} left"
            if task.fields["troubles"]:
                shown += f" · {task.fields['troubles']}"
        return Text(shown)


class Bar:
    """The progress of a run: a bar in a terminal, a line a cycle elsewhere."""

    def __init__(self, name: str, total: int, done: int = 0):
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _Numbers(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task(name, total=total, completed=done)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: int) -> None:
        """Shows the steps done, of a part without an evaluation."""
        self._progress.update(self._task, completed=done)

    def update(
        self,
        done: int,
        returns: Sequence[float],
        updates: float,
        left: float | None,
        troubles: str,
    ) -> None:
        """Shows where the run is: steps, mean returns of the first and the last stage, updates and
        seconds left, `troubles`.
        """
        self._progress.update(
            self._task,
            completed=done,
            returns=returns,
            updates=updates,
            left=left,
            troubles=troubles,
        )
        if not console.is_terminal:
            task = self._progress.tasks[self._task]
            console.print(_Numbers().render(task).plain, soft_wrap=True)


def task_names(family: Environment | type[Environment], tasks: Task) -> list[str]:
    """Returns what the family calls each task of leaves [K, ...], such as `1.25 m/s`."""
    tasks = jax.tree.map(np.asarray, tasks)
    count = jax.tree.leaves(tasks)[0].shape[0]
    return [family.title(jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(count)]


def table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> None:
    """Prints a table of numbers with a name in front of each row."""
    result = Table()
    result.add_column("", no_wrap=True)
    for name in columns:
        result.add_column(name, justify="right")
    for name, cells in rows:
        result.add_row(name, *cells)
    console.print(title, style="bold", soft_wrap=True)  # a narrow table would break it
    console.print(result)


def troubles(training: float, evaluation: float, failed: float) -> str:
    """Says how many episodes of training and of evaluation had physics that was not finite, and
    how many adaptations ended in weights that are not; "" if none did.
    """
    parts = (
        (training, "training episode", "blew up"),
        (evaluation, "evaluation episode", "blew up"),
        (failed, "adaptation", "failed"),
    )
    return ", ".join(
        f"{count:,.0f} {what}{'' if count == 1 else 's'} {did}"
        for count, what, did in parts
        if count
    )


def warn_of_troubles(
    training: float,
    evaluation: float,
    failed: float,
    failures: Sequence[Sequence[int]],
    names: Sequence[str],
    env: Environment,
) -> None:
    """Says what went wrong where, and how it counts.

    Args:
        training, evaluation, failed: as in `troubles`.
        failures: whether adaptation failed, [S, K].
        names: of the K tasks.
        env: the family.
    """
    text = troubles(training, evaluation, failed)
    if not text:
        return
    worst, length = env.worst_reward, env.episode_length
    text = f"note: {text}; every step that an episode had left counts as {worst:g}"
    if failed:
        where = sorted({names[k] for seed in failures for k, bad in enumerate(seed) if bad})
        text += f", the return of a failed adaptation as {worst * length:g}; failed on"
        text += f" {', '.join(where[:8])}{' and others' if len(where) > 8 else ''}"
    console.print(text, soft_wrap=True)


def warn_if_reuse_is_off(zero_shares: Iterable[float | None]) -> None:
    """Says so when the propensity found nothing in replay that looks like the new tasks.

    Args:
        zero_shares: of importance weights, of every seed; None or NaN where there is none.
    """
    known = [share for share in zero_shares if share is not None and math.isfinite(share)]
    zero_share = sum(known) / max(1, len(known))
    if zero_share > 0.95:
        console.print(
            f"note: {zero_share:.0%} of the importance weights are zero: adaptation reused next"
            " to no replay (see adapt/beta_* in metrics.jsonl)"
        )


def shown(program: Program) -> list[str]:
    """Returns the stages that differ: without step 1 there is nothing to see of it."""
    return [x for x in program.stages if program.config.adapt.step1_updates or x != _STEP1]


def called(config: Config, stage: str) -> str:
    """Returns what a stage of `Program.stages` is called, such as `before` of `return_pre`."""
    short = stage.removeprefix("return_")
    if config.algorithm == "mql":
        names = {"pre": "before", "step1": "after step 1", "post": "after"}
        return names.get(short, short.replace("shot", "shot "))
    if config.context_span == "episode":
        return "trained"
    number = {"pre": 1, "post": config.p3o.trial_episodes}.get(short)
    return f"episode {number or short.removeprefix('episode')}"


def header(program: Program, folders: Sequence[Path], steps: int) -> None:
    """Prints what is about to run, with the memory of replay and the update-to-data ratio."""
    config = program.config
    what = f"seeds {config.seed}..{config.seed + config.seeds - 1}"
    if len(folders) > 1:
        what = f"{len(program.runs)} runs, which differ in {', '.join(differing(program.runs))}"
    named = ", ".join(folder.name for folder in folders)
    where = folders[0] if len(folders) == 1 else f"{folders[0].parent}: {named}"
    device = jax.devices()[0]
    transitions = config.seeds * config.collect.rows * config.slots_per_row
    replay = memory.size(program.shapes.memory.data)
    console.print(config.task, style="bold", end="")
    console.print(
        f" · {config.algorithm} · {config.profile} · backend {config.backend}"
        f" · {device.platform} {device.device_kind} x{program.mesh.size}"
        f" · JAX {jax.__version__}\n"
        f"{what} · {config.tasks.train} training and {config.tasks.held_out} held-out tasks"
        f" · {config.collect.rows} rows x {config.collect.unroll} steps a round\n"
        f"replay {memory.human_bytes(replay)} for {transitions:,} transitions"
        f" ({replay / transitions:.0f} bytes each)"
        f" · {config.update_to_data:g} updates per environment step\n"
        f"{f'going on at {steps:,} steps, ' if steps else ''}writing to {where}",
        soft_wrap=True,
    )


def has_all(program: Program, row: Mapping[str, Any]) -> bool:
    """Returns whether a row of metrics.jsonl has what `report` reads of it."""
    if not any(name.startswith(("train/", "eval/")) for name in row):
        return "collect/blew_up" in row  # of warm-up that was not evaluated
    ends = (program.stages[0], program.stages[-1])  # the number of shots may have changed
    numbers = {*TROUBLES, f"eval/{program.stages[-1]}_p20"}
    numbers |= {f"eval/{stage}" for stage in ends}
    lists = {f"tasks/{name}" for name in (*ends, "failed")}
    return row.keys() >= numbers | lists and all(
        len(row[name]) == program.config.tasks.held_out for name in lists
    )


def report(program: Program, runs: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Prints the returns of runs: untrained, before adaptation, after each of its stages.

    Args:
        program: what was trained.
        runs: the whole of metrics.jsonl of each, by its directory.
    """
    config = program.config
    seeds = program.runs[0].seeds
    ends = []  # the rows of each run that are of the untrained agents, and of the trained ones
    for rows in runs.values():
        measured = [row for row in rows if "eval/return_pre" in row]  # not all of warm-up is
        ends.append((measured[:seeds], measured[-seeds:]))
    every = [row for _, last in ends for row in last]
    # A run that is done and goes on with another number of shots has the old ones.
    stages = [name for name in shown(program) if all(f"eval/{name}" in row for row in every)]

    def cells(
        run: int, name: str, pick: Any = lambda x: x, of: str = "return", digits: int = 1
    ) -> list[str]:
        """One stage after the other, of a metric of a run that `pick` makes a number."""
        first, last = ends[run]
        untrained = [pick(row[f"{name}/{of}_pre"]) for row in first]
        at = [stage.replace("return", of) for stage in stages]
        later = [[pick(row[f"{name}/{stage}"]) for row in last] for stage in at]
        return [mean_and_spread(values, digits) for values in (untrained, *later)]

    names = task_names(program.env, program.held_out)
    if len(runs) > 1:
        lines = [(folder.name, cells(i, "eval")) for i, folder in enumerate(runs)]
    else:
        lines = [("mean", cells(0, "eval"))]
        for k, name in enumerate(names if len(names) <= 4 else []):
            lines.append((name, cells(0, "tasks", lambda x, k=k: x[k])))
        worst = mean_and_spread([row[f"eval/{program.stages[-1]}_p20"] for row in every])
        lines.append(("worst fifth", [""] * len(stages) + [worst]))
        # What a family reports may be newer than a run's first rows.
        common = set.intersection(*({*row} for rows in ends[0] for row in rows))
        named = extras(x.removeprefix("eval/") for x in common if x.startswith("eval/"))
        lines += [(name, cells(0, "eval", of=name, digits=2)) for name in named]
    table(
        f"return on {config.tasks.held_out} held-out tasks after {every[0]['env_steps']:,} steps"
        + (f", mean ± std over {seeds} seeds" if seeds > 1 else ""),
        ["untrained", *(called(config, stage) for stage in stages)],
        lines,
    )
    warn_if_reuse_is_off([row.get("adapt/beta_zero_share") for row in every])
    rows = [row for rows in runs.values() for row in rows]
    measured = [row for row in rows if "eval/return_pre" in row]
    training, evaluation, failed = (
        sum(row[name] for row in among)
        for name, among in zip(TROUBLES, (rows, every, measured), strict=True)
    )
    of_tasks = [row["tasks/failed"] for row in measured]
    warn_of_troubles(training, evaluation, failed, of_tasks, names, program.env)


def extras(metrics: Iterable[str]) -> list[str]:
    """Returns what else than returns the family reports, by the names of an evaluation's metrics,
    such as `success_pre`.
    """
    return sorted({x.removesuffix("_pre") for x in metrics if x.endswith("_pre")} - {"return"})


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """Returns `12.3`, or `12.3 ± 4.5` for the values of several seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
