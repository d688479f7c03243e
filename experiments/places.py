"""Where runs are, and from which step they go on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import guard, hosts, population, run, terminal, tracking
from experiments.checkpoint import Checkpoints
from experiments.config import RunConfig, all_seeds, refuse_other
from experiments.mirror import Mirror
from experiments.program import Program, shardings
from jmql.settings import ConfigError
from jmql.train import TrainState


@dataclasses.dataclass
class Place:
    """A run that is trained, and where."""

    program: Program  # of this run alone
    folder: Path
    checkpoints: Checkpoints
    mirror: Mirror
    steps: list[int] = dataclasses.field(default_factory=list)  # of checkpoints, but for damaged


def opened(runs: Sequence[RunConfig]) -> tuple[Program, list[tuple[Program, Path, Mirror]]]:
    """Returns the program of runs side by side, and of each the program of it alone, its directory,
    one that goes on or a new one, and its mirror.

    Raises:
        ConfigError: they cannot work, or would learn under something else.
        RunFailed: the disk refuses.
    """
    there = [going_on(config) for config in runs]
    program = population.build([dataclasses.replace(config, resume="") for config in runs])
    found = []
    for config, (folder, mirror) in zip(program.runs, there, strict=True):
        alone = population.alone(program, config)
        if folder is not None and run.exists(folder):
            alone = run.with_tasks(folder, alone)
            guard.refuse_unwritable(folder)
        found.append((alone, folder, mirror))
    program = population.on_tasks_of(program, [alone for alone, *_ in found])
    # Only now, for nothing has been refused.
    made = [
        (alone, folder if folder and run.exists(folder) else run.create(alone), mirror)
        for alone, folder, mirror in found
    ]
    return on_tasks_of_first(program), made


def going_on(config: RunConfig) -> tuple[Path | None, Mirror]:
    """Returns the directory of a run, if it has a name, and its mirror.

    Raises:
        ConfigError: it is there and would learn under something else, or the mirror refuses.
    """
    named = run.folder_of(config, config.run_id) if config.run_id else None
    folder = Path(config.resume) if config.resume else named
    mirror = Mirror(config.mirror, folder or Path())
    mirror.fetch()
    if folder is not None and (config.resume or run.exists(folder)):
        refuse_other(config, run.read_config(folder), folder)
        run.refuse_unnamed(folder, config)
    return folder, mirror


def on_tasks_of_first(program: Program) -> Program:
    """Returns a program with the tasks of the first host, which may have read them."""
    tasks = (program.train_tasks, program.held_out)
    train_tasks, held_out = jax.tree.map(jnp.asarray, hosts.told(tasks, tasks))
    return dataclasses.replace(program, train_tasks=train_tasks, held_out=held_out)


def groups(program: Program, places: Sequence[Place]) -> list[tuple[int, list[Place]]]:
    """Returns runs that go on together, from which step: what is done first, and what has failed
    before last, each run alone.
    """
    config = program.config
    whole, warmup = (
        rounds * config.steps_per_round for rounds in (config.total_rounds, config.warmup_rounds)
    )
    done = [place for place in places if whole in place.steps]
    rest = [place for place in places if whole not in place.steps]
    again = [place for place in rest if (place.folder / run.FAILED).exists()]
    rest = [place for place in rest if place not in again]
    found = [(whole, done)] if done else []
    if rest:
        for start, among in population.together([place.steps for place in rest], warmup):
            found.append((start, [rest[i] for i in among]))
    return found + [(max(place.steps, default=0), [place]) for place in again]


def begun(program: Program, places: Sequence[Place], start: int) -> TrainState | None:
    """Returns the TrainState [S, ...] of runs that go on from the same step, or None where a
    checkpoint of that step is damaged, which `Place.steps` says no more.

    Raises:
        ConfigError: what is in a directory is not what its run has written.
        RunFailed: no checkpoint can be read.
    """
    states = []
    for place in places if start else ():
        state, step = run.restore(place.folder, place.program, place.checkpoints, start)
        place.steps = [saved for saved in place.steps if saved <= step]
        if step < start:
            return None
        states.append(state if len(places) == 1 else population.in_memory(state))
    for place in places if start else ():
        refuse_shorter(program.config, place.folder, start // program.config.steps_per_round)
        rows_of(place.program, place.folder, start)  # before more are added
    for place in places:
        place.checkpoints.drop(step for step in place.checkpoints.steps() if step > start)
    if len(states) > 1:
        return population.joined(program, states)
    return beginning(program, start, states[0] if states else None)


def beginning(program: Program, start: int = 0, state: TrainState | None = None) -> TrainState:
    """Returns the TrainState [S, ...] that training goes on from, on all devices of all hosts.

    Args:
        program: what is trained.
        start: its steps, as the first host says.
        state: of the first host, if there are any.
    """
    begun = np.int32(start // program.config.steps_per_round)
    if not hosts.told(begun, begun):
        return program.init(program.keys)
    if hosts.count() > 1:
        return hosts.placed(hosts.told(state, program.shapes), shardings(program.mesh))
    assert state is not None
    return state


def refuse_shorter(config: RunConfig, folder: Path, done: int) -> None:
    """Raises ConfigError if a run has done more rounds than it is to have."""
    if done > config.total_rounds:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; {folder} is at"
            f" {done * config.steps_per_round:,} steps; valid: as many, or more"
        )


def rows_of(program: Program, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl up to `steps`, with all that a report reads.

    Raises:
        ConfigError: a row lacks something, or they do not begin with the untrained agents and end
            with those after `steps`.
    """
    config, path = program.config, folder / tracking.METRICS
    rows, seeds = tracking.read(folder, steps), list(all_seeds(config))
    for number, row in enumerate(rows, 1):
        if not terminal.has_all(program, row):
            raise tracking.damaged(path, number)
    evaluated = [row for row in rows if "eval/return_pre" in row]
    warming_up = not evaluated and steps < config.total_rounds * config.steps_per_round
    first = (rows if warming_up else evaluated)[: config.seeds]
    untrained = [row["seed"] for row in first if not row["updates"]]
    trained = [row["seed"] for row in rows[-config.seeds :] if row["env_steps"] == steps]
    if not untrained == trained == seeds:
        raise ConfigError(
            f"{path} does not begin and end with rows of seeds {seeds[0]} to {seeds[-1]},"
            f" untrained and after {steps:,} steps; valid: the file that the run wrote"
        )
    return rows
