"""How far the runs of a sweep are."""

import time
from collections.abc import Sequence

from rich.table import Table

from experiments import run
from experiments.sweep import Job
from experiments.terminal import called, human_time
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


def _returns(progress: Progress) -> dict[str, str]:
    """Returns the first and the last return of an evaluation, by what they are called."""
    found: dict[str, str] = {}
    for stage in ("pre", "post"):
        name, value = called(progress.job.config, stage), progress.row.get(f"eval/return_{stage}")
        found[name] = found.get(name, "") if value is None else f"{value:.1f}"
    return found


def _state(progress: Progress) -> str:
    under_way = progress.steps and progress.state != "done"
    return progress.state + (f", {progress.steps / progress.total:.0%}" if under_way else "")


def table(runs: Sequence[Progress], caption: str | None = None) -> Table:
    """Returns a table of runs; at the end, where there is no caption, without their speed."""
    stages = list(dict.fromkeys(name for progress in runs for name in _returns(progress)))
    result = Table(caption=caption)
    result.add_column("run", no_wrap=True)
    result.add_column("state")
    for name in ["steps", *stages, *(("steps/s", "left") if caption else ())]:
        result.add_column(name, justify="right")
    for progress in runs:
        returns = _returns(progress)
        cells = [progress.job.name, _state(progress), f"{progress.steps:,}"]
        cells += [returns.get(name, "") for name in stages]
        if caption:
            speed = progress.row.get("time/env_steps_per_second")
            speed = f"{speed:,.0f}" if speed and progress.state == "running" else ""
            cells += [speed, progress.left()]
        result.add_row(*cells)
    return result


def line(progress: Progress) -> str:
    """Says how far a run is."""
    steps = f"{progress.steps:,} of {progress.total:,} steps"
    said = f"{progress.job.name} · {_state(progress)} · {steps}"
    returns = " → ".join(filter(None, _returns(progress).values()))
    return f"{said} · return {returns}" if returns and progress.state == "done" else said


def counts(runs: Sequence[Progress]) -> str:
    """Says how many runs are in each state."""
    states = [progress.state for progress in runs]
    return ", ".join(f"{states.count(x)} {x}" for x in _STATES if x in states)
