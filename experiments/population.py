"""Populations: runs side by side in one process, vmapped, that differ in seeds and numbers."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices, hosts, program
from experiments.config import RunConfig
from experiments.program import Program
from jmql import settings
from jmql.keys import is_key, plain
from jmql.settings import ConfigError, flatten
from jmql.train import TrainState

_OWN = ("seed", "run_id", "resume")  # beside the numbers, what each run has to itself


def common(run: RunConfig) -> RunConfig:
    """Returns what runs side by side have in common: equal for all that can be."""
    blank = dict.fromkeys(settings.numbers(run), 0.0) | {"seed": 0, "run_id": "", "resume": ""}
    return settings.replaced(run, blank)


def differing(runs: Sequence[RunConfig]) -> list[str]:
    """Returns the names of the settings, but for `run_id` and `resume`, in which runs differ."""
    flat = [flatten(run) for run in runs]
    return [
        name
        for name in flat[0]
        if name not in ("run_id", "resume") and any(one[name] != flat[0][name] for one in flat)
    ]


def build(runs: Sequence[RunConfig]) -> Program:
    """Builds the program of runs side by side.

    Raises:
        ConfigError: they cannot be, or none of them can work.
    """
    # What is a word in one of them is a value in none.
    free = set.intersection(*(set(settings.numbers(run)) for run in runs)) | {*_OWN}
    for name in differing(runs):
        if name not in free:
            raise ConfigError(
                f"{name} differs between runs of one process; valid: differences of"
                f" {', '.join(sorted(free - {'resume'}))}"
            )
    names = [run.run_id or run.resume for run in runs if run.run_id or run.resume]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"run_id {name} is given twice; valid: a name for each run")
    for run in runs:
        run.validate()
    seeds = sum(run.seeds for run in runs)
    built = program.build(dataclasses.replace(runs[0], seeds=seeds))
    return dataclasses.replace(built, runs=tuple(runs))


def alone(population: Program, run: RunConfig) -> Program:
    """Returns the program of one run of a population, on one device if there are others, or other
    hosts.
    """
    if len(population.runs) == 1 and hosts.count() == 1:
        return population
    over = devices.of_one()
    shapes = jax.tree.map(
        lambda where, part: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((run.seeds, *x.shape[1:]), x.dtype, sharding=where),
            part,
        ),
        program.shardings(over),
        population.shapes,
    )
    return dataclasses.replace(population, config=run, runs=(run,), mesh=over, shapes=shapes)


def joined(population: Program, states: Sequence[TrainState]) -> TrainState:
    """Returns the TrainState [S, ...] of a population, of those of its runs as `in_memory`."""

    def join(like: Any, *leaves: Any) -> Any:
        whole = np.concatenate(leaves)
        return jax.random.wrap_key_data(jnp.asarray(whole)) if is_key(like) else whole

    whole = jax.tree.map(join, population.shapes, *states)
    return jax.device_put(whole, program.shardings(population.mesh))


def in_memory(state: TrainState) -> TrainState:
    """Returns a state in the host's memory, keys as their data."""
    return jax.tree.map(lambda x: np.asarray(plain(x)), state)


def part(population: Program, state: TrainState, index: int) -> TrainState:
    """Returns the part of a population's TrainState [S, ...] that is one run's."""
    if len(population.runs) == 1:
        return state
    count = population.runs[index].seeds
    return _part(state, jnp.int32(index * count), count)


@functools.partial(jax.jit, static_argnums=2)
def _part(state: TrainState, first: jax.Array, count: int) -> TrainState:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), state)


def together(steps: Sequence[Collection[int]], nothing: int) -> list[tuple[int, list[int]]]:
    """Returns which runs go on together, from which step, for each group of them.

    They do so from the newest step that all have a checkpoint of: a kill comes between two saves.
    Where there is none, those whose newest is the same are a group.

    Args:
        steps: of the checkpoints of each run.
        nothing: up to so many there is nothing that would be lost by beginning anew.
    """
    everyone = list(range(len(steps)))
    common = set(steps[0]).intersection(*steps)
    if common:
        return [(max(common), everyone)]
    newest = [max(saved, default=0) for saved in steps]
    if max(newest) <= nothing:
        return [(0, everyone)]
    return [(step, [i for i in everyone if newest[i] == step]) for step in sorted(set(newest))]


def on_tasks_of(population: Program, runs: Sequence[Program]) -> Program:
    """Returns a population with the tasks that its runs have saved.

    Raises:
        ConfigError: they are not the same.
    """
    tasks = [(one.train_tasks, one.held_out) for one in runs]
    for one, other in zip(runs, tasks, strict=True):
        same = jax.tree.map(lambda x, y: bool((x == y).all()), tasks[0], other)
        if not jax.tree.all(same):
            raise ConfigError(
                f"{one.config.run_id} has tasks of its own; valid in one process: runs of the same"
            )
    return dataclasses.replace(population, train_tasks=tasks[0][0], held_out=tasks[0][1])
