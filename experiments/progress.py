"""How far the runs of a sweep are."""

import time
from collections.abc import Sequence

from rich.table import Table

from experiments import run
from experiments.sweep import Job
from experiments.terminal import human_time
from experiments.tracking import last_row

HELD = "waiting for another process"
_STATES = ("done", "running", "failed", "stopped", "saved", HELD, "waiting")


class Progress:
    """A run of a sweep, and how far it is."""

    def __init__(self, job: Job):
        self.job = job
        config = job.config
        self.total = config.total_rounds * config.steps_per_round
        self.state = "done" if finished(job, self.total) else "waiting"
        self.row = last_row(job.folder) or {}  # of metrics.jsonl
        self.since: tuple[float, int] | None = None  # when its process had its first row

    def look(self) -> None:
        """Looks at its last row."""
        before, self.row = self.row, last_row(self.job.folder) or self.row
        if self.since is None and before != self.row:
            self.since = time.monotonic(), self.steps

    @property
    def steps(self) -> int:
        """Environment steps done."""
        return int(self.row.get("env_steps", 0))

    def left(self) -> str:
        """Returns the time that it still takes, where that is known."""
        if self.state != "running" or self.since is None or self.steps <= self.since[1]:
            return ""
        seconds = (time.monotonic() - self.since[0]) / (self.steps - self.since[1])
        return human_time(seconds * (self.total - self.steps))


def finished(job: Job, steps: int) -> bool:
    """Returns whether a run has been trained to its end and saved."""
    return run.exists(job.folder) and (job.folder / "checkpoints" / str(steps)).is_dir()


def _cells(progress: Progress) -> list[str]:
    state, row = progress.state, progress.row
    if progress.steps and state != "done":
        state += f", {progress.steps / progress.total:.0%}"
    returns = [row.get(f"eval/return_{stage}") for stage in ("pre", "post")]
    speed = row.get("time/env_steps_per_second") if progress.state == "running" else None
    return [
        progress.job.name,
        state,
        f"{progress.steps:,}",
        *("" if value is None else f"{value:.1f}" for value in returns),
        f"{speed:,.0f}" if speed else "",
        progress.left(),
    ]


def table(runs: Sequence[Progress], caption: str | None = None) -> Table:
    """Returns a table of runs; at the end, where there is no caption, without their speed."""
    numbers = ["steps", "before", "after", *(("steps/s", "left") if caption else ())]
    result = Table(caption=caption)
    result.add_column("run", no_wrap=True)
    result.add_column("state")
    for name in numbers:
        result.add_column(name, justify="right")
    for progress in runs:
        result.add_row(*_cells(progress)[: 2 + len(numbers)])
    return result


def line(progress: Progress) -> str:
    """Says how far a run is."""
    name, state, steps, before, after, *_ = _cells(progress)
    returns = f" · return {before} → {after}" if before and progress.state == "done" else ""
    return f"{name} · {state} · {steps} of {progress.total:,} steps{returns}"


def counts(runs: Sequence[Progress]) -> str:
    """Says how many runs are in each state."""
    states = [progress.state for progress in runs]
    return ", ".join(f"{states.count(x)} {x}" for x in _STATES if x in states)
