"""Sweeps on Cloud TPU: each process is a managed job of SkyPilot, on a machine of its own."""

import difflib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments import guard
from experiments.config import RunFailed
from experiments.mirror import Mirror
from experiments.progress import Progress, counts, table
from experiments.sweep import Batch, Job, words
from experiments.terminal import console
from jmql.settings import ConfigError

LAUNCH = Path(__file__).parent / "launch"
_CLONE = LAUNCH.parents[1]
_INSTALL = (
    "SkyPilot is not here; valid: after `uv tool install 'skypilot[gcp]==0.14.*'`, a tool of its"
    " own of 600 MB, and `sky check gcp`"
)


def kinds() -> list[str]:
    """Returns what there are job files for, such as `v6e`."""
    return sorted(path.stem for path in LAUNCH.glob("*.yaml"))


def submissions(batches: Sequence[Batch], bucket: str, tpu: str) -> dict[str, list[str]]:
    """Returns the command that submits each batch, by the name of its job.

    Args:
        batches: of a sweep.
        bucket: `gs://BUCKET/FOLDER`, for runs and compiled programs.
        tpu: one of `kinds`.

    Raises:
        ConfigError: there is no such bucket or kind.
    """
    if tpu not in kinds():
        near = difflib.get_close_matches(tpu, kinds(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"tpu is {tpu!r}; {hint}valid: {', '.join(kinds())}")
    bucket = _folder(bucket)
    if _is_slice(tpu):  # a run to itself
        batches = [(job,) for batch in batches for job in batch]
    return {job_name(batch[0]): _submission(batch, bucket, tpu) for batch in batches}


def _folder(bucket: str) -> str:
    bucket = bucket.rstrip("/")
    if not re.fullmatch(r"gs://[\w.-]+(/[\w.+-]+)*", bucket):
        raise ConfigError(f"bucket is {bucket!r}; it must be gs://BUCKET or gs://BUCKET/FOLDER")
    return bucket


def _is_slice(tpu: str) -> bool:
    """Returns whether a kind has several hosts, such as `v6e-16`."""
    return "-" in tpu


def _submission(batch: Batch, bucket: str, tpu: str) -> list[str]:
    train = ["jmql", "train", *words(batch), "--mirror", f"{bucket}/runs"]
    command = shlex.join([*train, *(["--distributed"] if _is_slice(tpu) else [])])
    return [
        *("sky", "jobs", "launch", "--yes", "--detach-run", "--name", job_name(batch[0])),
        *("--env", f"JMQL_BUCKET={bucket}", "--env", f"JMQL_COMMAND={command}"),
        *(("--secret", "WANDB_API_KEY") if "WANDB_API_KEY" in os.environ else ()),
        f"experiments/launch/{tpu}.yaml",
    ]


def job_name(job: Job) -> str:
    """Returns what SkyPilot calls the process whose first run this is, in letters it allows."""
    return re.sub(r"[^a-zA-Z0-9]+", "-", f"jmql-{job.name}")


def submit(batches: Sequence[Batch], bucket: str, tpu: str) -> int:
    """Prints the commands that submit the batches of a sweep, and runs those that are not done.

    Raises:
        ConfigError: there is no such bucket or kind, or SkyPilot is not installed.
        RunFailed: it refuses one.
    """
    commands = submissions(batches, bucket, tpu)
    print(f"cd {shlex.quote(os.path.relpath(_CLONE))}")
    for command in commands.values():
        print(shlex.join(command), flush=True)
    sky, done = _sky(), _done(batches, _folder(bucket))
    todo = [job_name(batch[0]) for batch in batches if not done.issuperset(batch)]
    if _is_slice(tpu):
        todo = [job_name(job) for batch in batches for job in batch if job not in done]
    for name in todo:
        _run([sky, *commands[name][1:]])
    console.print(
        f"{len(todo)} jobs submitted, {len(commands) - len(todo)} are done"
        " · next: make sweep-status, make sweep-stop"
    )
    return 0


def _done(batches: Sequence[Batch], bucket: str) -> set[Job]:
    """Returns the jobs that the bucket has to their end; says so where it cannot be read."""
    done = set()
    try:
        for job in (job for batch in batches for job in batch):
            steps = Mirror(f"{bucket}/runs", job.folder).seen()["steps"]
            if steps >= Progress(job).total:
                done.add(job)
    except (ConfigError, RunFailed) as error:
        console.print(
            f"{bucket} cannot be read from here, so also what is done is submitted: {error}",
            soft_wrap=True,
        )
    return done


def status(batches: Sequence[Batch], bucket: str) -> int:
    """Prints how far the runs of a sweep are: here, or in a bucket with SkyPilot's jobs.

    Raises:
        ConfigError: the bucket refuses.
        RunFailed: it does not answer.
    """
    bucket = bucket and _folder(bucket)
    runs = [Progress(job) for batch in batches for job in batch]
    for progress in runs if not bucket else ():
        if guard.is_locked(progress.job.folder):
            progress.state = "running"
        elif progress.state == "waiting" and progress.steps:
            progress.state = "stopped"
    for progress in runs if bucket else ():
        found = Mirror(f"{bucket}/runs", progress.job.folder).seen()
        progress.row, progress.state = found["row"] or {}, "waiting"
        if found["steps"] >= 0:
            progress.state = "done" if found["steps"] >= progress.total else "saved"
    console.print(table(runs))
    console.print(counts(runs), soft_wrap=True)
    if bucket and shutil.which("sky"):
        _run([_sky(), "jobs", "queue"])
    return 0


def stop(batches: Sequence[Batch]) -> int:
    """Cancels the jobs of a sweep; their runs go on when it is submitted again.

    A job is called after its first run, and which runs are first was said when it was submitted:
    each is asked for, and SkyPilot says of most that there is none.

    Raises:
        ConfigError: SkyPilot is not installed.
        RunFailed: it refuses.
    """
    sky = _sky()
    for job in (job for batch in batches for job in batch):
        _run([sky, "jobs", "cancel", "--yes", "--name", job_name(job)])
    return 0


def _run(command: Sequence[str]) -> None:
    """Runs SkyPilot in the clone, for that is what it takes along.

    Raises:
        RunFailed: it says no.
    """
    if subprocess.run(command, cwd=_CLONE, check=False).returncode:
        raise RunFailed(
            f"`sky {' '.join(command[1:3])}` has failed, as it says above; `sky check gcp` looks at"
            " credentials"
        )


def _sky() -> str:
    sky = shutil.which("sky")
    if sky is None:
        raise ConfigError(_INSTALL)
    return sky
