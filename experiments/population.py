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
    free = {*settings.numbers(runs[0]), *_OWN}
    for name in differing(runs):
        if name not in free:
            raise ConfigError(
                f"{name} differs between runs of one process; valid: differences of"
                f" {', '.join(sorted(free - {'resume'}))}"
            )
    names = [run.run_id for run in runs if run.run_id]
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
    """Returns the TrainState [S, ...] of a population, of those of its runs."""
    if len(states) == 1:
        return states[0]

    def join(*leaves: Any) -> Any:
        if jax.dtypes.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(join(*map(jax.random.key_data, leaves)))
        return np.concatenate([np.asarray(x) for x in leaves])  # they may be on other devices

    return jax.device_put(jax.tree.map(join, *states), program.shardings(population.mesh))


def part(population: Program, state: TrainState, index: int) -> TrainState:
    """Returns the part of a population's TrainState [S, ...] that is one run's."""
    if len(population.runs) == 1:
        return state
    count = population.runs[index].seeds
    return _part(state, jnp.int32(index * count), count)


@functools.partial(jax.jit, static_argnums=2)
def _part(state: TrainState, first: jax.Array, count: int) -> TrainState:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), state)


def shared(steps: Sequence[Collection[int]], reached: Sequence[int], nothing: int) -> int:
    """Returns the step that runs go on from together: the newest of their checkpoints, if it is not
    one that another run had reached, too, when a kill came between the saves of the two.

    Args:
        steps: of the checkpoints of each run.
        reached: steps of each run of which there are results.
        nothing: up to so many there is nothing that would be lost by beginning anew.
    """
    candidates = sorted({0}.union(*steps), reverse=True)
    for step in candidates:
        lack = [i for i, saved in enumerate(steps) if step not in saved and reached[i] >= step]
        if (step and not lack) or (not step and candidates[0] <= nothing):
            return step
    return candidates[0]


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
