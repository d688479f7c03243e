"""What the user sees: the header, the progress bar and the final table."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from envs.base import Environment
from jmql.types import Task

STAGES = {"return_pre": "before", "return_step1": "after step 1", "return_post": "after step 2"}

# What is printed is shown as it is: paths may look like markup.
console = Console(highlight=False, markup=False, emoji=False)


def human_bytes(count: float) -> str:
    """Returns a size for people, such as `190 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


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
                f" · return {task.fields['pre']:.1f} → {task.fields['post']:.1f}"
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
        pre: float,
        post: float,
        updates: float,
        left: float | None,
        troubles: str,
    ) -> None:
        """Shows where the run is: steps, mean returns, updates and seconds left, `troubles`."""
        self._progress.update(
            self._task,
            completed=done,
            pre=pre,
            post=post,
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
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("")
    for name in columns:
        result.add_column(name, justify="right")
    for name, cells in rows:
        result.add_row(name, *cells)
    console.print(result)


def troubles(training: float, evaluation: float, failed: float) -> str:
    """Says how many episodes of training and of evaluation had physics that was not finite, and
    how many adaptations ended in weights that are not; "" if none did.
    """
    parts = (
        (training, "training episodes blew up"),
        (evaluation, "evaluation episodes blew up"),
        (failed, "adaptations failed"),
    )
    return ", ".join(f"{count:,.0f} {what}" for count, what in parts if count)


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
