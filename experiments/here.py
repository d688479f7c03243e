"""Runs the jobs of a sweep on this machine, some at a time."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from rich.live import Live
from rich.table import Table

from experiments import guard, run
from experiments.config import RunFailed
from experiments.stop import SAVED, Stop
from experiments.sweep import Batch, Job, words
from experiments.terminal import console, human_time
from experiments.tracking import last_row, tail

_OUTPUT = "output.txt"  # of a job, in its run directory
_ENDED = "the jobs that run are saving, and go on with the same command"
_HELD = "waiting for another process"
_STATES = ("done", "running", "failed", "stopped", _HELD, "waiting")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Progress:
    """A run of the sweep, and how far it is."""

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


class Work:
    """What one process trains: a run, or several side by side."""

    def __init__(self, batch: Batch):
        self.runs = [Progress(job) for job in batch]
        self.left = [progress for progress in self.runs if progress.state != "done"]
        self.output = batch[0].folder / _OUTPUT
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def waiting(self) -> bool:
        """Whether it has not been started."""
        return any(progress.state.startswith("waiting") for progress in self.left)

    def start(self, cores: Sequence[int]) -> None:
        """Starts what is left on some cores, its output at the end of its file.

        Raises:
            RunFailed: the disk refuses.
        """
        batch = tuple(progress.job for progress in self.left)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "experiments.cli", "train", *words(batch)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for us, who pass it on
                    preexec_fn=_bound(cores),
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"{self.output} cannot be written: {error}; {_ENDED}") from None
        for progress in self.left:
            progress.state, progress.since = "running", None

    def hold(self) -> bool:
        """Returns whether it must wait for what an earlier sweep has left, and says so."""
        held = any(guard.is_locked(progress.job.folder) for progress in self.left)
        for progress in self.left:
            progress.state = _HELD if held else "waiting"
        return held

    def look(self) -> None:
        """Looks whether the process has ended, and at the last rows."""
        code = self.process.poll() if self.process is not None else None
        for progress in self.left if self.process is not None else ():
            progress.look()
        if code is None:
            return
        self.process = None
        for progress in self.left:
            if finished(progress.job, progress.total):
                progress.state = "done"
            else:  # before it could answer, the signal has ended it
                progress.state = "stopped" if code in (SAVED, -signal.SIGTERM) else "failed"

    def said(self, name: str) -> str:
        """Returns the last line of its output, or the last about a run of several."""
        lines = tail(self.output).decode(errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        about = [line for line in lines if line.startswith(f"{name} failed: ")]
        return about[-1].removeprefix(f"{name} failed: ") if about else (lines or ["no output"])[-1]


def sweep(batches: Sequence[Batch], at_once: int, stop: Stop) -> int:
    """Runs batches of jobs, shows how far they are, and says what came of them.

    Those that are done are left, and those that were stopped go on. Where several processes run at
    a time, each has as many cores.

    Args:
        batches: of a sweep.
        at_once: processes at a time.
        stop: entered.

    Returns:
        The exit code: 0; 1 if a job failed, `stop.SAVED` if one has been stopped.
    """
    works = [Work(batch) for batch in batches]
    stop.ready = True
    try:
        _run(works, min(at_once, len(works)), stop)
    finally:
        _save(works)
    return _end(works, stop)


def _run(works: Sequence[Work], at_once: int, stop: Stop) -> None:
    """Runs works until all have ended, or those that run have been stopped."""
    free = _shares(at_once)
    on: dict[int, Sequence[int]] = {}  # the cores of a work, by its place
    runs = [progress for work in works for progress in work.runs]
    told = [progress.state for progress in runs]
    passed = False
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            for i, work in enumerate(works):
                work.look()
                if work.process is None and i in on:
                    free.append(on.pop(i))
                if work.waiting and free and not stop.signal and not work.hold():
                    on[i] = free.pop()
                    work.start(on[i])
            for i, progress in enumerate(runs):
                if told[i] != progress.state and not console.is_terminal:
                    console.print(_line(progress), soft_wrap=True)
                told[i] = progress.state
            if stop.signal and not passed:
                passed = True
                _save(works)
            if console.is_terminal:  # which may be lower than all of them
                shown = [x for x in runs if x.state not in ("done", "waiting")]
                live.update(_table(shown, _counts(runs)), refresh=True)
            if not on and (stop.signal or not any(work.waiting for work in works)):
                break
            time.sleep(0.5)


def _save(works: Sequence[Work]) -> None:
    """Asks those that run to save and end."""
    for work in works:
        if work.process is not None:
            work.process.send_signal(signal.SIGTERM)


def finished(job: Job, steps: int) -> bool:
    """Returns whether a run has been trained to its end and saved."""
    return run.exists(job.folder) and (job.folder / "checkpoints" / str(steps)).is_dir()


def _shares(count: int) -> list[Sequence[int]]:
    """Returns the cores of each of some processes, as many for each; all where they are alone."""
    if count == 1 or not hasattr(os, "sched_getaffinity"):
        return [()] * count
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // count)
    return [[cores[(i * each + k) % len(cores)] for k in range(each)] for i in range(count)]


def _bound(cores: Sequence[int]) -> Callable[[], None]:
    """Returns what a new process does first: it stays on its cores, and does not outlive us."""
    c = ctypes.CDLL(None)

    def bind() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if sys.platform == "linux":
            c.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return bind


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


def _table(runs: Sequence[Progress], caption: str | None = None) -> Table:
    """Returns a table of runs; at the end, where there is no caption, without their speed."""
    numbers = ["steps", "before", "after", *(("steps/s", "left") if caption else ())]
    table = Table(caption=caption)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in numbers:
        table.add_column(name, justify="right")
    for progress in runs:
        table.add_row(*_cells(progress)[: 2 + len(numbers)])
    return table


def _line(progress: Progress) -> str:
    name, state, steps, before, after, *_ = _cells(progress)
    returns = f" · return {before} → {after}" if before and progress.state == "done" else ""
    return f"{name} · {state} · {steps} of {progress.total:,} steps{returns}"


def _end(works: Sequence[Work], stop: Stop) -> int:
    runs = [progress for work in works for progress in work.runs]
    console.print(_table(runs))
    for work in works:
        for progress in work.runs:
            if progress.state == "failed":
                name = progress.job.name
                console.print(f"{name} failed: {work.said(name)} ({work.output})", soft_wrap=True)
    states = {progress.state for progress in runs}
    unfinished = states - {"done", "failed"}
    what = f"go on with: {stop.again}" if states - {"done"} else "every row is in metrics.jsonl"
    console.print(f"{_counts(runs)} · {what}", soft_wrap=True)
    if unfinished:
        return SAVED
    return 1 if "failed" in states else 0


def _counts(runs: Sequence[Progress]) -> str:
    states = [progress.state for progress in runs]
    return ", ".join(f"{states.count(x)} {x}" for x in _STATES if x in states)
