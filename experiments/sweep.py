"""A sweep: a YAML file of settings to combine becomes jobs, one `jmql train` each."""

import dataclasses
import difflib
import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments import population, program, run
from experiments.config import RunConfig, refuse_other
from jmql.settings import ConfigError, flatten

_PARTS = ("name", "base", "grid", "points", "seeds")
_OURS = ("run_id", "resume", "seed", "seeds")  # settings that a sweep makes
_LONGEST = 200  # bytes of the name of a folder
Words = tuple[str, ...]  # a value as it stands in the file: one word, or several of a tuple
Point = dict[str, Words]  # values by the dotted names of settings


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    words: tuple[str, ...]  # of the command line, after `jmql train`
    config: RunConfig  # what they say

    @property
    def name(self) -> str:
        """The run id: the same for the same point and seed."""
        return self.config.run_id

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run.folder_of(self.config, self.name)


Batch = tuple[Job, ...]  # what one process trains: a job, or several side by side


def read(path: Path, parse: Callable[[list[str]], RunConfig]) -> list[Job]:
    """Returns the jobs of a sweep: each point of the grid with each seed.

    Args:
        path: a YAML file of `name`, and any of `base` (settings of all jobs by their dotted names),
            `grid` (settings with the values to combine), `points` (a list of settings to combine
            with the grid, where a grid is not enough) and `seeds` (a list).
        parse: makes a configuration of words of the command line.

    Raises:
        ConfigError: the file is no sweep, or a job of it cannot work.
    """
    sweep = _load(path)
    name = sweep.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(
            f"name in {path} is {name!r}; it must be a name of letters, digits, and . _ + -"
        )
    base = _point(path, "base", sweep.get("base", {}))
    grid = {
        key: [_words(path, f"grid.{key}", value) for value in _list(path, f"grid.{key}", values)]
        for key, values in _settings(path, "grid", sweep.get("grid", {})).items()
    }
    points = [
        _point(path, "points", point) for point in _list(path, "points", sweep.get("points", [{}]))
    ]
    for key in (set(base) | {key for point in points for key in point}) & set(grid):
        raise ConfigError(f"{key} is in the grid of {path} and beside it; valid: once")
    seeds = _words(path, "seeds", _list(path, "seeds", sweep.get("seeds", ["0"])))
    label = _labels({key for point in points for key in point} | set(grid))
    jobs = []
    for point, values, seed in itertools.product(points, itertools.product(*grid.values()), seeds):
        varied = dict(zip(grid, values, strict=True)) | point
        told = [label(key, value) for key, value in varied.items()]
        run_id = "-".join([name, *told, f"s{seed}"])
        size = len(run_id.encode())
        if size > _LONGEST:
            raise ConfigError(
                f"{path} makes the name {run_id[:40]}... of {size} bytes; it must have at"
                f" most {_LONGEST}: vary less, or in sweeps of their own"
            )
        tags = {"tracking.tags": (name, *(base | varied).get("tracking.tags", ()))}
        words = [*_flags(base | varied | tags), "--seed", seed, "--run-id", run_id]
        jobs.append(_job(path, words, parse))
    seen: dict[RunConfig, str] = {}
    for job in jobs:
        what = dataclasses.replace(job.config, run_id="")
        if what in seen:
            raise ConfigError(
                f"{path} has {job.name} twice, the first as {seen[what]}; valid: points, values and"
                " seeds that differ"
            )
        seen[what] = job.name
    _refuse_impossible(jobs)
    return jobs


def batches(jobs: Sequence[Job], most: int) -> list[Batch]:
    """Returns jobs in batches: those that differ only in seeds and numbers can share a process.

    Args:
        jobs: of a sweep.
        most: how many of them a process trains.
    """
    alike: dict[RunConfig, list[Job]] = {}
    for job in jobs:
        alike.setdefault(population.common(job.config), []).append(job)
    return [tuple(part) for group in alike.values() for part in _parts(group, most)]


def _parts(jobs: Sequence[Job], most: int) -> Iterable[Sequence[Job]]:
    """Yields jobs in as few parts as can be, about equal."""
    count = -(-len(jobs) // most)
    size = -(-len(jobs) // count)
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def words(batch: Batch) -> list[str]:
    """Returns the command line of a batch, after `jmql train`."""
    if len(batch) == 1:
        return list(batch[0].words)
    flags = [_by_flag(job.words) for job in batch]
    shared = [flag for flag in flags[0] if all(flag in other for other in flags)]
    own = [[word for flag in one if flag not in shared for word in flag] for one in flags]
    members = [word for words in own for word in ("--member", shlex.join(words))]
    return [*(word for flag in shared for word in flag), *members]


def _by_flag(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the words of a command line, each flag with its values."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    return [tuple(words[i:j]) for i, j in itertools.pairwise([*starts, len(words)])]


def listing(all_batches: Sequence[Batch]) -> Iterable[str]:
    """Yields the commands of batches, as a script for a shell."""
    for batch in all_batches:
        groups = {run.group(job.config): None for job in batch}
        if len(batch) > 1:
            varied = ", ".join(population.differing([job.config for job in batch]))
            yield f"# {len(batch)} runs side by side in one process, which differ in {varied}"
        yield f"# W&B group{'s' if len(groups) > 1 else ''} {', '.join(groups)}"
        yield command(batch)


def command(batch: Batch) -> str:
    """Returns what a shell runs a batch by, a line for each of its runs."""
    text = shlex.join(["jmql", "train", *words(batch)])
    return text.replace(" --member ", " \\\n  --member ")


class _Text(yaml.BaseLoader):
    """Leaves every value the text that it is, to become a word of a command."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As in YAML, but that nothing may be said twice."""
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is there twice, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _load(path: Path) -> dict[str, Any]:
    try:
        sweep = yaml.load(path.read_text(encoding="utf-8"), _Text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; valid: a YAML file") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sweep, dict):
        raise ConfigError(f"{path} is no sweep; valid: a mapping of {', '.join(_PARTS)}")
    for part in sweep:
        _refuse_unknown(path, f"part {part!r}", part, _PARTS)
    return sweep


def _refuse_unknown(path: Path, what: str, name: str, valid: Iterable[str]) -> None:
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
        raise ConfigError(f"{path} has an unknown {what}; {hint}")


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} in {path} is {value!r}; it must be a list of at least one")
    return value


def _settings(path: Path, where: str, value: Any) -> Mapping[str, Any]:
    """Returns a mapping of settings, all of which there are."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} in {path} is {value!r}; it must be a mapping of settings")
    for key in value:
        if key in _OURS:
            raise ConfigError(f"{where} in {path} sets {key}, which a sweep makes of its seeds")
        _refuse_unknown(path, f"setting {key!r} in {where}", key, flatten(RunConfig()))
    return value


def _point(path: Path, where: str, value: Any) -> Point:
    settings = _settings(path, where, value)
    return {key: _words(path, f"{where}.{key}", text) for key, text in settings.items()}


def _words(path: Path, where: str, value: Any) -> Words:
    words = value if isinstance(value, list) else [value]
    good = (isinstance(word, str) and word and not word.startswith("--") for word in words)
    if not words or not all(good):
        raise ConfigError(f"{where} in {path} is {value!r}; it must be a value or a list of values")
    return tuple(words)


def _flags(settings: Point) -> list[str]:
    """Returns settings as words of the command line, the task first: it decides on defaults."""
    defaults, words = flatten(RunConfig()), []
    for key in sorted(settings, key=lambda key: key != "task"):
        flag, value = key.replace("_", "-"), settings[key]
        if isinstance(defaults[key], bool):
            if value not in (("true",), ("false",)):
                raise ConfigError(f"{key} is {' '.join(value)!r}; it must be true or false")
            component, _, field = flag.rpartition(".")
            no = "" if value == ("true",) else "no-"
            words.append(f"--{component}{'.' if component else ''}{no}{field}")
        else:
            words += [f"--{flag}", *value]
    return words


def _labels(keys: Iterable[str]) -> Callable[[str, Words], str]:
    """Returns what run ids call a value of each setting, such as `lr3e-4` of td3.learning_rate."""

    def short(key: str) -> str:
        field = key.rpartition(".")[2]
        return "lr" if field == "learning_rate" else field

    keys = list(keys)
    taken = [short(key) for key in keys]
    names = {key: short(key) if taken.count(short(key)) == 1 else key for key in keys}
    defaults = flatten(RunConfig())

    def label(key: str, value: Words) -> str:
        text = "x".join(value)
        if isinstance(defaults[key], bool):
            field = key.rpartition(".")[2].replace("_", "-")
            return field if text == "true" else f"no-{field}"
        if isinstance(defaults[key], str):  # speaks for itself
            return re.sub(r"[^\w.+]", "_", text.rpartition(":")[2])
        return re.sub(r"[^\w.+-]", "_", names[key] + text)

    return label


def _job(path: Path, words: list[str], parse: Callable[[list[str]], RunConfig]) -> Job:
    try:
        config = parse(words)
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{words[-1]} of {path}: {error}") from None
    return Job(tuple(words), config)


def _refuse_impossible(jobs: Sequence[Job]) -> None:
    """Raises ConfigError where a family, a split or a run that is there says no."""
    looked_at = set()
    for job in jobs:
        config = job.config
        names = (config.task, config.backend, config.split, config.tasks, config.observe_task)
        try:
            if names not in looked_at:
                program.named(config)
                looked_at.add(names)
            if run.exists(job.folder):
                before = run.read_config(job.folder)
                refuse_other(config, before, job.folder)
                if run.group(before) != run.group(config):
                    raise ConfigError(
                        f"{job.folder} was adapted or evaluated with other settings; valid: a sweep"
                        " of another name"
                    )
        except (ConfigError, OSError) as error:
            raise ConfigError(f"{job.name}: {error}") from None
