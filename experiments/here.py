"""Runs the jobs of a sweep on this machine, some at a time."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from experiments import guard, run
from experiments.config import RunFailed
from experiments.stop import SAVED, Stop
from experiments.sweep import Job
from experiments.terminal import console, human_time
from experiments.tracking import METRICS

_OUTPUT = "output.txt"  # of a job, in its run directory
_LAST = 65_536  # bytes from the end of a file in which its last line is
_ENDED = "the jobs that run are saving, and go on with the same command"
_STATES = ("done", "running", "failed", "stopped", "waiting")
_SHOWN = ("running", "failed", "stopped")  # while it runs
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Work:
    """A job, and how far it is."""

    def __init__(self, job: Job):
        self.job = job
        config = job.config
        self.total = config.total_rounds * config.steps_per_round
        self.row: dict[str, Any] = {}  # the last of metrics.jsonl
        self.state = "done" if finished(job, self.total) else "waiting"
        self.process: subprocess.Popen[bytes] | None = None
        self.since: tuple[float, int] | None = None  # when this process had its first row
        self.look()

    def start(self, cores: Sequence[int]) -> None:
        """Starts the job on some cores, its output at the end of its file.

        Raises:
            RunFailed: the disk refuses.
        """
        path = self.job.folder / _OUTPUT
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "experiments.cli", "train", *self.job.words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for us, who pass it on
                    preexec_fn=_bound(cores),
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"{path} cannot be written: {error}; {_ENDED}") from None
        self.state, self.since = "running", None

    def look(self) -> None:
        """Looks whether the process has ended, and at its last row."""
        code = self.process.poll() if self.process is not None else None
        before, self.row = self.row, last_row(self.job.folder) or self.row
        if self.since is None and before != self.row:
            self.since = time.monotonic(), self.steps
        if code is not None:
            self.process = None
            if code == 0 or finished(self.job, self.total):
                self.state = "done"
            else:  # before it could answer, the signal has ended it
                self.state = "stopped" if code in (SAVED, -signal.SIGTERM) else "failed"

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

    def said(self) -> str:
        """Returns the last line of its output."""
        lines = _tail(self.job.folder / _OUTPUT).decode(errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        return lines[-1] if lines else "no output"


def sweep(jobs: Sequence[Job], at_once: int, stop: Stop) -> int:
    """Runs jobs, shows how far they are, and says what came of them.

    Those that are done are left, and those that were stopped go on. Where several run at a time,
    each has as many cores.

    Args:
        jobs: of a sweep.
        at_once: processes at a time.
        stop: entered.

    Returns:
        The exit code: 0; 1 if a job failed, `stop.SAVED` if one has been stopped.
    """
    works = [Work(job) for job in jobs]
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
    told = {i: work.state for i, work in enumerate(works)}
    passed = False
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            for i, work in enumerate(works):
                work.look()
                if work.process is None and i in on:
                    free.append(on.pop(i))
                if work.state == "waiting" and free and not stop.signal:
                    if guard.is_locked(work.job.folder):  # by what an earlier sweep has left
                        continue
                    on[i] = free.pop()
                    work.start(on[i])
                if told[i] != work.state and not console.is_terminal:
                    console.print(_line(work), soft_wrap=True)
                told[i] = work.state
            if stop.signal and not passed:
                passed = True
                _save(works)
            if console.is_terminal:  # which may be lower than all of them
                live.update(
                    _table([x for x in works if x.state in _SHOWN], _counts(works)), refresh=True
                )
            states = {work.state for work in works}
            if "running" not in states and ("waiting" not in states or stop.signal):
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


def last_row(folder: Path) -> dict[str, Any] | None:
    """Returns the last whole row of metrics.jsonl, if there is one."""
    lines = _tail(folder / METRICS).split(b"\n")[:-1]
    try:
        row = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "env_steps" in row else None


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST))
            return file.read()
    except OSError:
        return b""


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


def _cells(work: Work) -> list[str]:
    state, row = work.state, work.row
    if work.steps and state != "done":
        state += f", {work.steps / work.total:.0%}"
    returns = [row.get(f"eval/return_{stage}") for stage in ("pre", "post")]
    speed = row.get("time/env_steps_per_second") if work.process else None
    return [
        work.job.name,
        state,
        f"{work.steps:,}",
        *("" if value is None else f"{value:.1f}" for value in returns),
        f"{speed:,.0f}" if speed else "",
        work.left(),
    ]


def _table(works: Sequence[Work], caption: str = "") -> Table:
    table = Table(caption=caption)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("steps", "before", "after", "steps/s", "left"):
        table.add_column(name, justify="right")
    for work in works:
        table.add_row(*_cells(work))
    return table


def _line(work: Work) -> str:
    name, state, steps, before, after, *_ = _cells(work)
    returns = f" · return {before} → {after}" if before and work.state == "done" else ""
    return f"{name} · {state} · {steps} of {work.total:,} steps{returns}"


def _end(works: Sequence[Work], stop: Stop) -> int:
    console.print(_table(works))
    failed = [work for work in works if work.state == "failed"]
    for work in failed:
        where = work.job.folder / _OUTPUT
        console.print(f"{work.job.name} failed: {work.said()} ({where})", soft_wrap=True)
    unfinished = any(work.state in ("stopped", "waiting") for work in works)
    what = f"go on with: {stop.again}" if unfinished or failed else "every row is in metrics.jsonl"
    console.print(f"{_counts(works)} · {what}", soft_wrap=True)
    if unfinished:
        return SAVED
    return 1 if failed else 0


def _counts(works: Sequence[Work]) -> str:
    states = [work.state for work in works]
    return ", ".join(f"{states.count(x)} {x}" for x in _STATES if x in states)
