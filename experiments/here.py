"""Runs the jobs of a sweep on this machine, some at a time."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from rich.live import Live

from experiments import guard, run
from experiments.config import RunFailed
from experiments.progress import HELD, Progress, counts, finished, line, table
from experiments.stop import SAVED, Stop
from experiments.sweep import Batch, words
from experiments.terminal import console
from experiments.tracking import tail

_OUTPUT = "output.txt"  # of a job, in its run directory
_ENDED = "the jobs that run are saving, and go on with the same command"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
            progress.state = HELD if held else "waiting"
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
            elif (progress.job.folder / run.FAILED).exists():
                progress.state = "failed"
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
                    console.print(line(progress), soft_wrap=True)
                told[i] = progress.state
            if stop.signal and not passed:
                passed = True
                _save(works)
            if console.is_terminal:  # which may be lower than all of them
                shown = [x for x in runs if x.state not in ("done", "waiting")]
                live.update(table(shown, counts(runs)), refresh=True)
            if not on and (stop.signal or not any(work.waiting for work in works)):
                break
            time.sleep(0.5)


def _save(works: Sequence[Work]) -> None:
    """Asks those that run to save and end."""
    for work in works:
        if work.process is not None:
            work.process.send_signal(signal.SIGTERM)


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


def _end(works: Sequence[Work], stop: Stop) -> int:
    runs = [progress for work in works for progress in work.runs]
    console.print(table(runs))
    for work in works:
        for progress in work.runs:
            if progress.state == "failed":
                name = progress.job.name
                console.print(f"{name} failed: {work.said(name)} ({work.output})", soft_wrap=True)
    states = {progress.state for progress in runs}
    unfinished = states - {"done", "failed"}
    what = f"go on with: {stop.again}" if states - {"done"} else "every row is in metrics.jsonl"
    console.print(f"{counts(runs)} · {what}", soft_wrap=True)
    if unfinished:
        return SAVED
    return 1 if "failed" in states else 0
