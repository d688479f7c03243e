"""Groups of runs that differ in nothing but their seeds, and what their seeds earned."""

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import run
from experiments.config import all_seeds
from experiments.report import source
from experiments.report.source import Source
from jmql.settings import ConfigError, flatten

_STAGES = ("return_pre", "return_post")
# Equal in all that is compared: else returns are of other tasks or another physics.
_SAME = ("task", "backend", "split", "tasks.seed", "tasks.held_out", "tasks.held_out_ranges")


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one seed earned at each evaluation."""

    seed: int
    steps: np.ndarray  # [E]
    seconds: np.ndarray  # [E]
    returns: dict[str, np.ndarray]  # of `_STAGES`, [E, K] of tasks, or [E, 1] of their means

    def at(self, reached: np.ndarray, limit: float) -> int:
        """Returns the last evaluation within a limit of steps or seconds; -1: there is none."""
        return int(np.searchsorted(reached, limit, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    name: str
    sources: list[Source]
    curves: list[Curve]

    def values(self, stage: str, by: str, limit: float) -> np.ndarray | None:
        """Returns what the seeds earned [S, K] when they had taken so many steps or seconds; None
        where one had no evaluation yet.
        """
        picked = [(curve, curve.at(getattr(curve, by), limit)) for curve in self.curves]
        if any(at < 0 for _, at in picked):
            return None
        return np.stack([curve.returns[stage][at] for curve, at in picked])

    def reach(self, by: str) -> float:
        """Returns up to which step or second all seeds have evaluations."""
        return min(float(getattr(curve, by)[-1]) for curve in self.curves)

    def means(self, stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps that all seeds have, and means over seeds and tasks, [E] each."""
        common = set.intersection(*(set(curve.steps.tolist()) for curve in self.curves))
        steps = np.array(sorted(common))
        whole = [
            curve.returns[stage][np.isin(curve.steps, steps)].mean(axis=1) for curve in self.curves
        ]
        return steps, np.mean(whole, axis=0)


def folders(words: Sequence[str]) -> list[Path]:
    """Returns the run directories of paths and patterns; a folder stands for the runs in it.

    Raises:
        ConfigError: one of them has none.
    """
    found: dict[Path, None] = {}
    for word in words:
        paths = sorted(map(Path, glob.glob(word)))
        inside = [
            path
            for one in paths
            for path in ([one] if run.exists(one) else sorted(one.glob("*")))
            if run.exists(path)
        ]
        if not inside:
            raise ConfigError(
                f"{word} has no runs; valid: run directories, such as runs/ant_dir/*, or a folder"
                " of them"
            )
        found |= dict.fromkeys(inside)
    return list(found)


def read(paths: Sequence[Path], left_out: list[str]) -> list[Source]:
    """Reads runs; adds to `left_out` which cannot be read, and why.

    Raises:
        ConfigError: none can.
    """
    found = []
    for path in paths:
        try:
            found.append(source.read(path))
        except ConfigError as error:  # of another version, say
            left_out.append(str(error))
    if not found:
        raise ConfigError("; ".join(left_out))
    return found


def grouped(runs: Sequence[Source]) -> tuple[list[Group], list[str]]:
    """Returns the groups of runs in their order, and what is left out, and why.

    Raises:
        ConfigError: they cannot be compared.
    """
    left_out = [f"{it.folder} has no evaluation yet" for it in runs if not it.steps]
    sources = [it for it in runs if it.steps]
    if not sources:
        raise ConfigError(
            f"no run has an evaluation yet; {'; '.join(left_out)}; valid: one that has"
        )
    first = sources[0]
    refuse_other(first, sources)
    groups: dict[str, list[Source]] = {}
    for it in sources:
        groups.setdefault(run.group(it.config), []).append(it)
    names = _names([some[0] for some in groups.values()])
    result = []
    for name, some in zip(names, groups.values(), strict=True):
        curves = [curve for it in some for curve in _curves(it)]
        seeds = [curve.seed for curve in curves]
        for seed in sorted({x for x in seeds if seeds.count(x) > 1}):
            twice = [str(it.folder) for it in some if seed in all_seeds(it.config)]
            raise ConfigError(
                f"{' and '.join(twice)} are the same run of seed {seed}; valid: one of them"
            )
        if not set.intersection(*(set(curve.steps.tolist()) for curve in curves)):
            raise ConfigError(
                f"runs of {name} have no evaluation at a step in common; valid: seeds of one sweep"
            )
        result.append(Group(name, some, curves))
    return result, left_out


def refuse_other(first: Source, others: Sequence[Source]) -> None:
    """Raises ConfigError where returns do not compare."""
    mine = flatten(first.config)
    for it in others:
        theirs = flatten(it.config)
        for name in _SAME:
            if mine[name] != theirs[name]:
                raise ConfigError(
                    f"{it.folder} has {name} {theirs[name]!r}, and {first.folder} {mine[name]!r}:"
                    f" their returns do not compare; valid: runs of one {name}"
                )
        tasks = it.parameters("held_out"), first.parameters("held_out")
        same = tasks[0].keys() == tasks[1].keys() and all(
            np.array_equal(leaf, tasks[1][name]) for name, leaf in tasks[0].items()
        )
        if not same:
            raise ConfigError(
                f"{it.folder} has other held-out tasks than {first.folder}: their returns do not"
                " compare; valid: runs on the same"
            )


def _curves(it: Source) -> list[Curve]:
    seconds = it.seconds
    found = []
    for i, seed in enumerate(all_seeds(it.config)):
        returns: dict[str, list[np.ndarray]] = {stage: [] for stage in _STAGES}
        for steps in it.steps:
            for stage, read in zip(_STAGES, ("return_pre", it.last), strict=True):
                values = it.values(f"tasks/{read}", steps)
                if values is None:
                    values = it.values(f"eval/{read}", steps)
                assert values is not None
                returns[stage].append(np.atleast_1d(values[i]))
        found.append(
            Curve(
                seed,
                np.array(it.steps),
                np.array([seconds[steps] for steps in it.steps]),
                {stage: np.stack(values) for stage, values in returns.items()},
            )
        )
    return found


def differing(sources: Sequence[Source]) -> list[str]:
    """Returns the settings in which groups differ, but for seeds and places."""
    flat = [run.but_for_seeds(it.config) for it in sources]
    return [name for name in flat[0] if any(one[name] != flat[0][name] for one in flat)]


def _names(sources: Sequence[Source]) -> list[str]:
    """Returns what groups are called: what they differ in, such as `tau 0.01`."""
    read = [{*it.config.read} for it in sources]
    keys = [key for key in differing(sources) if all(key in names for names in read)]
    short = [key.rpartition(".")[2] for key in keys]
    called = [key if short.count(name) > 1 else name for key, name in zip(keys, short, strict=True)]
    names = []
    for it in sources:
        flat = flatten(it.config)
        said = [f"{name} {flat[key]}" for key, name in zip(keys[:3], called, strict=False)]
        names.append(", ".join(said) or it.folder.name)
    if len(set(names)) < len(names):  # they differ in more
        return [f"{name} ({it.folder.name})" for name, it in zip(names, sources, strict=True)]
    return names
