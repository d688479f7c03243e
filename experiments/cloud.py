"""Sweeps on Cloud TPU: each process is a managed job of SkyPilot, on a machine of its own."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments.config import RunFailed
from experiments.mirror import Mirror
from experiments.progress import Progress, counts, table
from experiments.sweep import Batch, words
from experiments.terminal import console
from jmql.settings import ConfigError

LAUNCH = Path(__file__).parent / "launch"
_INSTALL = (
    "SkyPilot is not here; valid: after `uv tool install 'skypilot[gcp]==0.14.*'`, a tool of its"
    " own of 600 MB, and `sky check gcp`"
)


def kinds() -> list[str]:
    """Returns what there are job files for, such as `v6e`."""
    return sorted(path.stem for path in LAUNCH.glob("*.yaml"))


def submissions(batches: Sequence[Batch], bucket: str, tpu: str) -> list[list[str]]:
    """Returns the command that submits each batch.

    Args:
        batches: of a sweep.
        bucket: `gs://BUCKET/FOLDER`, for runs and compiled programs.
        tpu: one of `kinds`.

    Raises:
        ConfigError: there is no such bucket or kind.
    """
    if not re.fullmatch(r"gs://[\w.-]+(/[\w.+-]+)*", bucket):
        raise ConfigError(f"bucket is {bucket!r}; it must be gs://BUCKET or gs://BUCKET/FOLDER")
    if tpu not in kinds():
        raise ConfigError(f"tpu is {tpu!r}; valid: {', '.join(kinds())}")
    if _is_slice(tpu):  # a run to itself
        batches = [(job,) for batch in batches for job in batch]
    return [_submission(batch, bucket, tpu) for batch in batches]


def _is_slice(tpu: str) -> bool:
    """Returns whether a kind has several hosts, such as `v6e-16`."""
    return "-" in tpu


def _submission(batch: Batch, bucket: str, tpu: str) -> list[str]:
    train = ["jmql", "train", *words(batch), "--mirror", f"{bucket}/runs"]
    command = shlex.join([*train, *(["--distributed"] if _is_slice(tpu) else [])])
    return [
        *("sky", "jobs", "launch", "--yes", "--detach-run", "--name", job_name(batch)),
        *("--env", f"JMQL_BUCKET={bucket}", "--env", f"JMQL_COMMAND={command}"),
        *(("--secret", "WANDB_API_KEY") if "WANDB_API_KEY" in os.environ else ()),
        os.path.relpath(LAUNCH / f"{tpu}.yaml"),
    ]


def job_name(batch: Batch) -> str:
    """Returns what SkyPilot calls a batch: as its first run, in letters that it allows."""
    return re.sub(r"[^\w.-]", "-", f"jmql-{batch[0].name}")


def submit(commands: Sequence[Sequence[str]]) -> int:
    """Prints the commands that submit the batches of a sweep, and runs them.

    Raises:
        ConfigError: SkyPilot is not installed.
        RunFailed: it refuses one.
    """
    for command in commands:
        print(shlex.join(command), flush=True)
    sky = _sky()
    for command in commands:
        if subprocess.run([sky, *command[1:]], check=False).returncode:
            raise RunFailed(
                f"SkyPilot has refused {command[command.index('--name') + 1]}, as it says above;"
                " `sky check gcp` looks at credentials"
            )
    console.print(f"{len(commands)} jobs submitted · next: make sweep-status, make sweep-stop")
    return 0


def status(batches: Sequence[Batch], bucket: str) -> int:
    """Prints how far the runs of a sweep are: here, or in a bucket with SkyPilot's jobs.

    Raises:
        ConfigError: the bucket refuses.
    """
    runs = [Progress(job) for batch in batches for job in batch]
    for progress in runs if bucket else ():
        found = Mirror(f"{bucket}/runs", progress.job.folder).seen()
        progress.row, progress.state = found["row"] or {}, "waiting"
        if found["steps"] >= 0:
            progress.state = "done" if found["steps"] >= progress.total else "saved"
    console.print(table(runs))
    console.print(counts(runs), soft_wrap=True)
    if bucket and shutil.which("sky"):
        subprocess.run([_sky(), "jobs", "queue"], check=False)
    return 0


def stop(batches: Sequence[Batch]) -> int:
    """Cancels the jobs of a sweep; their runs go on when it is submitted again.

    Raises:
        ConfigError: SkyPilot is not installed.
    """
    sky = _sky()
    for batch in batches:
        subprocess.run([sky, "jobs", "cancel", "--yes", "--name", job_name(batch)], check=False)
    return 0


def _sky() -> str:
    sky = shutil.which("sky")
    if sky is None:
        raise ConfigError(_INSTALL)
    return sky
