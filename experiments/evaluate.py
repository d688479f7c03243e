"""Adapts a trained run to held-out tasks that it has not met."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import memory, run, terminal
from experiments.presets import RunFailed
from experiments.run import Setup
from experiments.terminal import STAGES, console
from jmql import evaluate as algorithm
from jmql.config import LARGEST_INT, LARGEST_SEED, ConfigError
from jmql.keys import derive

_CHUNK = 32  # tasks adapted side by side, each with an agent of its own
_BYTES = 64  # kept of each task, at the least


def evaluate(folder: Path, num_tasks: int, seed: int, split: str = "") -> None:
    """Draws tasks, adapts to each, prints the returns and appends them to evaluations.jsonl.

    Args:
        folder: a run directory.
        num_tasks: how many tasks.
        seed: of the tasks and episodes; the same seed gives the same numbers.
        split: whose held-out ranges the tasks are drawn from; empty is as the run's were.

    Raises:
        ConfigError: the folder is not a finished run, or a value cannot work.
    """
    if not 1 <= num_tasks <= LARGEST_INT or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(
            f"num-tasks is {num_tasks} and seed is {seed}; valid: from 1 to {LARGEST_INT:,} and"
            f" from 0 to {LARGEST_SEED:,}"
        )
    setup = run.load(folder, run.read_config(folder))
    if not setup.config.checkpoint.replay:
        raise ConfigError(
            f"{folder} was saved without its replay (checkpoint.replay False);"
            " adaptation needs one: valid are runs that saved it"
        )
    task = setup.config.task
    ranges = run.split(setup.env, task, split)[1] if split else setup.held_out_ranges
    count = memory.needed(setup.config, setup.env, setup.shapes, min(num_tasks, _CHUNK))
    count += setup.config.seeds * num_tasks * _BYTES
    memory.refuse_too_much(f"an evaluation of {num_tasks} tasks", count)
    with run.logged(folder):
        _evaluate(folder, setup, num_tasks, seed, ranges)


def _evaluate(
    folder: Path, setup: Setup, num_tasks: int, seed: int, ranges: dict[str, tuple[float, float]]
) -> None:
    state = run.trained(folder, setup)
    key = jax.random.key(seed)
    tasks = setup.env.sample_tasks(derive(key, "fresh tasks"), num_tasks, ranges)
    key = derive(key, "fresh evaluation")
    size = min(num_tasks, _CHUNK)
    chunks = -(-num_tasks // size)

    @jax.jit
    def adapt(agent: Any, memory: Any, tasks: Any, key: jax.Array) -> Any:
        return jax.vmap(
            lambda agent, memory: algorithm.evaluate(
                setup.config, setup.env, setup.networks, agent, memory, tasks, key
            )
        )(agent, memory)

    parts = []
    with console.status(f"adapting to {num_tasks} tasks"):
        for i in range(chunks):
            # The last chunk is filled up with tasks from the beginning; they are dropped below.
            index = np.arange(i * size, (i + 1) * size) % num_tasks
            chunk = jax.tree.map(lambda x, index=index: x[index], tasks)
            fold = jax.random.fold_in(key, i)
            parts.append(jax.device_get(adapt(state.agent, state.memory, chunk, fold)))
    per_task = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :num_tasks], *parts)
    summary = jax.device_get(jax.vmap(algorithm.summarize)(jax.tree.map(jnp.asarray, per_task)))
    steps = int(state.rounds[0]) * setup.config.steps_per_round
    lines = []
    for i, trained in enumerate(run.seeds(setup.config)):
        row: dict[str, Any] = {"seed": trained, "env_steps": steps, "num_tasks": num_tasks}
        row |= {"task_seed": seed, "ranges": ranges}
        row |= {k: float(v[i]) for k, v in sorted(summary.items()) if np.isfinite(v[i])}
        row |= {f"tasks/{stage}": per_task[stage][i].tolist() for stage in STAGES}
        row["tasks/failed"] = per_task["failed"][i].astype(int).tolist()
        lines.append(json.dumps(row) + "\n")
    terminal.table(
        f"{setup.config.task} after {steps:,} steps: return on {num_tasks} fresh held-out tasks",
        [*STAGES.values(), "worst fifth"],
        [
            (
                f"seed {trained}",
                [f"{summary[f'eval/{name}'][i]:.1f}" for name in (*STAGES, "return_post_p20")],
            )
            for i, trained in enumerate(run.seeds(setup.config))
        ],
    )
    terminal.warn_if_reuse_is_off(summary["adapt/beta_zero_share"].tolist())
    terminal.warn_of_troubles(
        0,
        summary["eval/blew_up"].sum(),
        summary["adapt/failed"].sum(),
        per_task["failed"].tolist(),
        terminal.task_names(tasks),
        setup.env,
    )
    path = folder / "evaluations.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise RunFailed(f"these numbers are not kept, {path} cannot be written: {error}") from None
    console.print(f"written to {path}", soft_wrap=True)
