"""What a run directory says of a run, as far as it can be read: a page shows what there is."""

import dataclasses
import json
import math
import shlex
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import presets, run
from experiments.config import RunConfig, all_seeds
from experiments.tracking import METRICS, is_row
from jmql.settings import ConfigError, flatten

STUDIES, EPISODES, LOG = "evaluations.jsonl", "episodes.npz", "log.txt"
AS_SET = "as set"  # how the newest study calls the run's own way to adapt
_SPEED = "time/env_steps_per_second"
Row = dict[str, Any]

# Settings that say where a run is, not what it is.
_PLACE = ("run_id", "resume", "runs", "mirror", "tracking.wandb", "tracking.project")


@dataclasses.dataclass(frozen=True)
class Source:
    """A run directory."""

    folder: Path
    config: RunConfig
    record: dict[str, Any]  # config.json
    rows: list[Row]  # of metrics.jsonl, of all seeds
    studies: list[Row]  # of the newest `make evaluate`, a row for each seed and way to adapt
    tasks: dict[str, np.ndarray]  # by `train/NAME` and `held_out/NAME`, leaves [K, ...]
    episodes: dict[str, np.ndarray]  # of EPISODES; none if nothing was played yet
    log: list[str]  # lines of log.txt
    problems: list[str]  # what could not be read

    @property
    def steps(self) -> list[int]:
        """Environment steps at which there was an evaluation, of all seeds."""
        counts = [row["env_steps"] for row in self.rows if "eval/return_pre" in row]
        return sorted(steps for steps in set(counts) if counts.count(steps) == self.config.seeds)

    def values(self, name: str, steps: int) -> np.ndarray | None:
        """Returns a metric at some step, [S] or, of single tasks, [S, K]; None where one lacks."""
        found = [row.get(name) for row in self.rows if row["env_steps"] == steps]
        lengths = {len(x) if isinstance(x, list) else 0 for x in found if x is not None}
        if None in found or len(found) != self.config.seeds or len(lengths) != 1:
            return None
        return np.array(found, float)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a metric is there, and its means over seeds."""
        means: dict[int, list[float]] = {}
        for row in self.rows:
            if name in row:
                means.setdefault(row["env_steps"], []).append(row[name])
        return list(means), [float(np.mean(x)) for x in means.values()]

    @property
    def total(self) -> int:
        """Environment steps of the whole run."""
        return self.config.total_rounds * self.config.steps_per_round

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of cycles, evaluations included, up to each step; without compilation."""
        clock, before = 0.0, 0
        result: dict[int, float] = {}
        for row in self.rows:
            if row["seed"] != self.config.seed:
                continue
            speed = row["time/env_steps_per_second"]
            clock += self.config.seeds * (row["env_steps"] - before) / speed
            before = row["env_steps"]
            result[before] = clock
        return result

    @property
    def last(self) -> str:
        """The last stage that is reported: of an algorithm that has no other the first."""
        has_post = any("eval/return_post" in row for row in self.rows)
        return "return_post" if has_post else "return_pre"

    @property
    def state(self) -> str:
        """Says how far the run is."""
        done = self.rows[-1]["env_steps"] if self.rows else 0
        failed = self.folder / run.FAILED
        if failed.exists():
            return f"failed after {done:,} steps: {failed.read_text(encoding='utf-8').strip()}"
        if done >= self.total:
            return f"finished: {done:,} steps"
        return f"{done:,} of {self.total:,} steps ({done / self.total:.0%})"

    @property
    def changed(self) -> list[tuple[str, Any, Any]]:
        """Settings that differ from the profile: name, value, the profile's."""
        it = self.config
        try:
            preset = flatten(presets.preset(it.task, it.profile, it.algorithm))
        except (ConfigError, KeyError):  # of a family that is not here
            return []
        ours = flatten(self.config)
        return [(k, ours[k], v) for k, v in preset.items() if k not in _PLACE and ours[k] != v]

    @property
    def command(self) -> str:
        """A command that trains such a run."""
        it = self.config
        words = ["jmql", "train", "--task", it.task, "--profile", it.profile]
        words += ["--algorithm", it.algorithm] if it.algorithm != "mql" else []
        for name, value, _ in self.changed:
            component, dot, field = name.replace("_", "-").rpartition(".")
            if isinstance(value, bool):
                words.append(f"--{component}{dot}{'' if value else 'no-'}{field}")
            else:
                words += [f"--{component}{dot}{field}", *_texts(value)]
        return shlex.join(words)

    def parameters(self, part: str) -> dict[str, np.ndarray]:
        """Returns the parameters of the tasks of `train` or `held_out`, leaves [K, ...]."""
        return {
            name.partition("/")[2]: leaf
            for name, leaf in self.tasks.items()
            if name.startswith(f"{part}/")
        }


def read(folder: Path) -> Source:
    """Reads a run directory, which may still be written to.

    Raises:
        ConfigError: it is none.
    """
    config, problems = run.read_config(folder), []
    record = json.loads((folder / "config.json").read_bytes())

    def rows(name: str, good: Callable[[Any], bool]) -> list[Row]:
        found = []
        for number, row in _lines(folder / name):
            if good(row):
                found.append(row)
            else:
                problems.append(f"line {number} of {name} is damaged and left out")
        return found

    def arrays(name: str) -> dict[str, np.ndarray]:
        try:
            with np.load(folder / name) as file:
                return dict(file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            problems.append(f"{name} cannot be read: {error}")
            return {}

    metrics = rows(METRICS, lambda row: is_row(row) and row.get(_SPEED, 0) > 0)
    studies = rows(STUDIES, lambda row: isinstance(row, dict) and row.keys() >= {"seed"})
    seeds = set(all_seeds(config))
    log = folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Source(
        folder,
        config,
        record,
        [row for row in metrics if row["seed"] in seeds],
        newest(studies),
        arrays("tasks.npz"),
        arrays(EPISODES),
        text.splitlines(),
        problems,
    )


def newest(studies: Sequence[Row]) -> list[Row]:
    """Returns the rows of the last study, which begin with those of `as set`, one a seed."""
    first, seeds = len(studies), set()
    for i in range(len(studies) - 1, -1, -1):
        row = studies[i]
        if row.get("adapted") == AS_SET and row["seed"] not in seeds:
            first = i
            seeds.add(row["seed"])
        elif seeds:
            break
    return list(studies[first:])


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the whole lines of a JSON file, numbered from 1; None for one that is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # a torn one comes last
    except OSError:
        return
    for number, line in enumerate(lines, 1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError):
            yield number, None


def _texts(value: Any) -> list[str]:
    """Returns a value as words of the command line."""
    if isinstance(value, tuple):
        return [text for part in value for text in _texts(part)]
    return [str(value)]


def sides_of(episodes: dict[str, np.ndarray]) -> list[str]:
    """Returns what the episodes of a task are called; runs before 0.3 do not say."""
    return [str(name) for name in episodes.get("sides", ("before", "after"))]


def finite(values: Any) -> list[float | None]:
    """Returns numbers for a chart: None, a gap, for what is not finite."""
    return [float(x) if math.isfinite(x) else None for x in np.ravel(values)]
