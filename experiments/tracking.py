"""Where results go: metrics.jsonl, which is the record, and W&B, which is a view of it."""

import http.client
import json
import logging
import math
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from experiments.config import RunConfig, all_seeds
from jmql.settings import ConfigError

log = logging.getLogger("jmql")

METRICS = "metrics.jsonl"
_LAST = 65_536  # bytes from the end of a file that are looked at first
_COUNTS = {"seed", "env_steps", "updates"}  # whole numbers, in every row

# Seconds that a server may take to answer at all, to begin a run, and to take what is left at the
# end. W&B's own limits are 90 seconds and none; what does not arrive stays in the run directory.
_ANSWER_TIMEOUT, _INIT_TIMEOUT, _FINISH_TIMEOUT = 3, 10, 15


def read(folder: Path, steps: float = math.inf) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, all or those that reach `steps`. A torn last line
    is none, as a missing file is.

    Raises:
        ConfigError: a line is not what a run has written; the message names it.
    """
    return [row for row, _ in _rows(folder / METRICS, steps)]


def drop_rows(folder: Path, steps: int) -> None:
    """Cuts metrics.jsonl after the rows that reach `steps`: what a killed run wrote and lost."""
    path = folder / METRICS
    if path.exists():
        os.truncate(path, sum(length for _, length in _rows(path, steps)))


def last_row(folder: Path) -> dict[str, Any] | None:
    """Returns the last whole row of metrics.jsonl, if there is one."""
    path, size, end = folder / METRICS, _LAST, b""
    while len(end := tail(path, size)) == size and end.count(b"\n") < 2:
        size *= 2  # a row of many tasks is long
    lines = end.split(b"\n")[:-1]
    try:
        row = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "env_steps" in row else None


def tail(path: Path, size: int = _LAST) -> bytes:
    """Returns the last bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read()
    except OSError:
        return b""


def damaged(path: Path, number: int) -> ConfigError:
    """Returns the error of a line of a file, counted from 1."""
    return ConfigError(f"line {number} of {path} is damaged; valid: the lines that the run wrote")


def _rows(path: Path, steps: float) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the rows that reach `steps`, and the bytes of their lines."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # a torn one comes last
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; valid: the file that the run wrote"
        ) from None
    for number, line in enumerate(lines, 1):
        row = _row(path, number, line)
        if row["env_steps"] > steps:
            return
        yield row, len(line) + 1


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not is_row(row):
        raise damaged(path, number)
    return dict(row)


def is_row(row: Any) -> bool:
    """Returns whether this is what a run writes into metrics.jsonl."""
    if not isinstance(row, dict) or not row.keys() >= _COUNTS:
        return False
    return all(_is_right(name, value) for name, value in row.items())


def _is_right(name: str, value: Any) -> bool:
    """Returns whether a value is a number, a whole one of a count, or a list of them, of tasks."""
    if name.startswith("tasks/"):
        return isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return isinstance(value, int if name in _COUNTS else int | float)


def wandb_mode(asked: str, environment: Mapping[str, str]) -> str:
    """Returns W&B's mode: asked for, or WANDB_MODE, else online with a key, else offline.

    Args:
        asked: `tracking.wandb`.
        environment: of the process.
    """
    if asked != "auto":
        return asked
    if environment.get("WANDB_MODE"):
        return environment["WANDB_MODE"]
    return "online" if environment.get("WANDB_API_KEY") or _has_netrc_key() else "offline"


def _has_netrc_key() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: str) -> bool:
    """Returns whether a server says anything, be it an error."""
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException, ValueError):
        return False


_live: list[Any] = []  # W&B's runs that this process has begun, of other trackers


class Tracker:
    """Writes one row for each seed and cycle. W&B that fails is reported once and left alone.

    Args:
        folder: the run directory.
        config: of the run.
        record: what config.json says.
        steps: where the run goes on; rows past it are dropped, and a torn last line.
    """

    def __init__(self, folder: Path, config: RunConfig, record: dict[str, Any], steps: int):
        drop_rows(folder, steps)
        self._folder, self._mirror = folder, config.mirror
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self.exit_code = 0  # for W&B, which shows another code as a failed run
        self._seeds = all_seeds(config)
        self._runs: list[Any] = []
        mode = wandb_mode(config.tracking.wandb, os.environ)
        self.wandb = mode
        if mode != "disabled":
            try:
                self._start(folder, config, record, mode)
            except Exception as error:
                self._fail(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._file.close()
        try:
            for run in self._runs:
                run.finish(exit_code=1 if error else self.exit_code)
        except Exception as error:
            self._fail(error)
        _live.clear()  # trackers of a process end together

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Writes the metrics of one cycle, one row a seed. Values that do not exist are left out.

        Args:
            rows: scalars and lists by metric name; `env_steps` in every row.
        """
        rows = [{k: v for k, v in row.items() if _exists(v)} for row in rows]
        numbered = zip(self._seeds, rows, strict=True)
        lines = [json.dumps({"seed": seed} | row) + "\n" for seed, row in numbered]
        self._file.write("".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())  # before a checkpoint that these rows lead to
        try:
            for run, row in zip(self._runs, rows, strict=False):
                run.log({k: v for k, v in row.items() if not isinstance(v, list)})
        except Exception as error:
            self._fail(error)

    def warn(self, text: str) -> None:
        """Writes a line to log.txt of this run."""
        log.warning(text, extra={"folder": self._folder})

    def tasks(self, columns: list[str], rows: list[list[list[Any]]]) -> None:
        """Sends a table of per-task results for each seed to W&B."""
        try:
            for run, data in zip(self._runs, rows, strict=False):
                import wandb

                run.log({"eval/tasks": wandb.Table(columns=columns, data=data)})
        except Exception as error:
            self._fail(error)

    def page(self, path: Path) -> None:
        """Sends a page to the W&B run of the first seed, and where the checkpoints are."""
        try:
            for run in self._runs[:1]:
                import wandb

                run.log({"report": wandb.Html(str(path), inject=False)})
                kept = wandb.Artifact(f"{run.id}-checkpoints", type="checkpoints")
                there = self._folder.resolve().as_uri()
                if self._mirror:
                    there = "/".join([self._mirror.rstrip("/"), *self._folder.parts[-2:]])
                kept.add_reference(f"{there}/checkpoints", checksum=False)
                run.log_artifact(kept)
        except Exception as error:
            self._fail(error)

    @property
    def urls(self) -> list[str]:
        """Pages of the runs, if they are online."""
        return [run.url for run in self._runs if getattr(run, "url", None)]

    def _start(self, folder: Path, config: RunConfig, record: dict[str, Any], mode: str) -> None:
        import wandb

        path = folder.resolve()  # also of `--resume .`
        # A name that was given may be another task's as well.
        run_id = f"{path.parent.name}-{path.name}" if config.run_id else path.name
        ids = {seed: f"{run_id}-s{seed}" for seed in self._seeds}
        if "WANDB_SWEEP_ID" in os.environ:  # an agent has made a run for this process
            ids[config.seed] = os.environ.get("WANDB_RUN_ID", ids[config.seed])

        def init(seed: int, mode: Any) -> Any:
            run = wandb.init(
                project=config.tracking.project,
                group=record["group"],
                job_type="train",
                id=ids[seed],
                name=f"{config.task}-{run_id}-s{seed}",
                tags=[
                    *(config.task, config.algorithm, config.profile, record["device"]),
                    *config.tracking.tags,
                ],
                config=record,
                dir=folder,
                mode=mode,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=_INIT_TIMEOUT,
                    finish_timeout=_FINISH_TIMEOUT,
                    x_disable_stats=True,
                ),
            )
            for names in ("eval/*", "adapt/*", "collect/*", "train/*", "time/*"):
                run.define_metric(names, step_metric="env_steps")
            return run

        if mode == "online":
            url = wandb.setup().settings.base_url
            if not _answers(url):
                self.warn(f"W&B at {url} does not answer, recording offline")
                if not _live:  # it would end them
                    wandb.teardown()
                mode = "offline"
        # W&B's own process reads this when it starts; without it, it still looks for the server.
        os.environ["WANDB_MODE"] = mode
        for seed in self._seeds:
            try:
                self._runs.append(init(seed, mode))
            except Exception as error:
                if mode != "online" or _live:
                    raise
                self.warn(f"W&B is not reachable, recording offline: {error}")
                wandb.teardown()
                os.environ["WANDB_MODE"] = mode = "offline"
                self._runs.append(init(seed, mode))
        self.wandb = mode
        _live.extend(self._runs)

    def _fail(self, error: Exception) -> None:
        self.warn(f"W&B stopped: {error}")
        self._runs, self.wandb = [], "failed, see log.txt"


def _exists(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def to_rows(results: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Splits metrics [S] or [S, K] into plain rows, one a seed, with numbers or lists."""
    counts = ("env_steps", "updates")
    names = [*counts, *sorted(results.keys() - counts)]
    return [{k: results[k][i].tolist() for k in names} for i in range(len(results["updates"]))]
