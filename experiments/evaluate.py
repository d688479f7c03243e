"""Adapts a trained run to held-out tasks that it has not met."""

import functools
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments import guard, memory, run, terminal
from experiments.config import RunConfig, RunFailed, all_seeds
from experiments.program import EQUAL, Program, each
from experiments.program import split as named_split
from experiments.terminal import columns, console
from jmql import evaluate as algorithm
from jmql.keys import derive
from jmql.settings import ConfigError, Kind, flatten
from jmql.train import TrainState
from jmql.types import Key, Metrics, Task

_CHUNK = 32  # tasks adapted side by side, each with an agent of its own
_BYTES = 64  # kept of each task, at the least


def evaluate(folder: Path, config: RunConfig, num_tasks: int, seed: int, split: str = "") -> None:
    """Draws tasks, adapts to each, prints the returns and appends them to evaluations.jsonl.

    Args:
        folder: a run directory.
        config: its configuration, in which what is measured with may have changed.
        num_tasks: how many tasks.
        seed: of the tasks and episodes; the same seed gives the same numbers.
        split: whose held-out ranges the tasks are drawn from; empty is as the run's were.

    Raises:
        ConfigError: the folder is not a finished run, or a value cannot work.
    """
    program = run.load(folder, config, min(num_tasks, _CHUNK))
    if not program.config.checkpoint.replay:
        raise ConfigError(
            f"{folder} was saved without its replay (checkpoint.replay False);"
            " adaptation needs one: valid are runs that saved it"
        )
    task = program.config.task
    ranges = named_split(program.env, task, split)[1] if split else program.held_out_ranges
    memory.refuse_too_much(f"an evaluation of {num_tasks:,} tasks", num_tasks * _BYTES)
    with guard.logged(folder):
        _evaluate(folder, program, num_tasks, seed, ranges)


def adapted(program: Program, state: TrainState, tasks: Task, key: Key) -> dict[str, np.ndarray]:
    """Returns the metrics [S, N] of `jmql.evaluate` on N tasks, some of them at a time."""
    num_tasks = len(jax.tree.leaves(tasks)[0])
    size = min(num_tasks, _CHUNK)

    def evaluated(state: TrainState, tasks: Task, key: Key) -> Metrics:
        def one(state: TrainState) -> Metrics:
            return algorithm.evaluate(
                program.config, program.env, program.learner, state.agent, state.memory, tasks, key
            )

        return cast(Metrics, each(one, state))

    parts, first = [], jax.tree.map(lambda x: x[:size], tasks)
    compiled = jax.jit(program.spread(evaluated, EQUAL)).lower(state, first, key).compile()
    needed = memory.in_one(memory.of_program(compiled), program.mesh)
    memory.refuse_too_much(f"this evaluation ({memory.SETTINGS} and num_tasks make it)", needed)
    for i in range(-(-num_tasks // size)):
        # The last chunk is filled up with tasks from the beginning; they are dropped below.
        index = np.arange(i * size, (i + 1) * size) % num_tasks
        chunk = jax.tree.map(lambda x, index=index: x[index], tasks)
        parts.append(jax.device_get(compiled(state, chunk, jax.random.fold_in(key, i))))
    metrics: dict[str, np.ndarray] = jax.tree.map(
        lambda *x: np.concatenate(x, axis=1)[:, :num_tasks], *parts
    )
    return metrics


def _evaluate(
    folder: Path,
    program: Program,
    num_tasks: int,
    seed: int,
    ranges: dict[str, tuple[float, float]],
) -> None:
    state = run.trained(folder, program)
    key = jax.random.key(seed)
    tasks = program.env.sample_tasks(derive(key, "fresh tasks"), num_tasks, ranges)
    with console.status(f"adapting to {num_tasks} tasks"):
        per_task = adapted(program, state, tasks, derive(key, "fresh evaluation"))
    summarize = functools.partial(algorithm.summarize, program.learner)
    summary = jax.device_get(jax.vmap(summarize)(jax.tree.map(jnp.asarray, per_task)))
    steps = int(state.rounds[0]) * program.config.steps_per_round
    measured = flatten(program.config, Kind.MEASURED)
    lines = []
    for i, trained in enumerate(all_seeds(program.config)):
        row: dict[str, Any] = {"seed": trained, "env_steps": steps, "num_tasks": num_tasks}
        row |= {"task_seed": seed, "ranges": ranges, "measured": measured}
        row |= {k: float(v[i]) for k, v in sorted(summary.items()) if np.isfinite(v[i])}
        row |= {f"tasks/{stage}": per_task[stage][i].tolist() for stage in program.stages}
        row["tasks/failed"] = per_task["failed"][i].astype(int).tolist()
        lines.append(json.dumps(row) + "\n")
    terminal.table(
        f"{program.config.task} after {steps:,} steps: return on {num_tasks} fresh held-out tasks",
        [*columns(program.stages), "worst fifth"],
        [
            (
                f"seed {trained}",
                [
                    f"{summary[f'eval/{name}'][i]:.1f}"
                    for name in (*program.stages, f"{program.stages[-1]}_p20")
                ],
            )
            for i, trained in enumerate(all_seeds(program.config))
        ],
    )
    terminal.warn_if_reuse_is_off(summary["adapt/beta_zero_share"].tolist())
    terminal.warn_of_troubles(
        0,
        summary["eval/blew_up"].sum(),
        summary["adapt/failed"].sum(),
        per_task["failed"].tolist(),
        terminal.task_names(program.env, tasks),
        program.env,
    )
    path = folder / "evaluations.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise RunFailed(f"these numbers are not kept, {path} cannot be written: {error}") from None
    console.print(f"written to {path}", soft_wrap=True)
