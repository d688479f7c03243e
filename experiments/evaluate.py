"""Adapts a trained run to held-out tasks that it has not met."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run, terminal
from experiments.run import Setup
from experiments.terminal import STAGES, console
from jmql import evaluate as algorithm
from jmql.config import ConfigError

_CHUNK = 32  # tasks adapted side by side, each with an agent of its own


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
    if num_tasks < 1 or seed < 0:
        raise ConfigError(f"num-tasks is {num_tasks} and seed is {seed}; valid: from 1 and from 0")
    setup = run.load(folder, run.read_config(folder))
    if not setup.config.checkpoint.replay:
        raise ConfigError(
            f"{folder} was saved without its replay (checkpoint.replay False);"
            " adaptation needs one: valid are runs that saved it"
        )
    task = setup.config.task
    ranges = run.split(setup.env, task, split)[1] if split else setup.held_out_ranges
    with run.logged(folder):
        _evaluate(folder, setup, num_tasks, seed, ranges)


def _evaluate(
    folder: Path, setup: Setup, num_tasks: int, seed: int, ranges: dict[str, tuple[float, float]]
) -> None:
    state = run.trained(folder, setup)
    # Apart from the keys of training, whose tasks come from jax.random.key(tasks.seed).
    task_key, key = jax.random.split(jax.random.fold_in(jax.random.key(seed), num_tasks))
    tasks = setup.env.sample_tasks(task_key, num_tasks, ranges)
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
    steps = int(state.env_steps[0])
    with (folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        for i, trained in enumerate(run.seeds(setup.config)):
            row: dict[str, Any] = {"seed": trained, "env_steps": steps, "num_tasks": num_tasks}
            row |= {"task_seed": seed, "ranges": ranges}
            row |= {name: float(value[i]) for name, value in sorted(summary.items())}
            row |= {f"tasks/{stage}": per_task[stage][i].tolist() for stage in STAGES}
            file.write(json.dumps(row) + "\n")
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
    terminal.warn_if_reuse_is_off(float(summary["adapt/beta_zero_share"].mean()))
    console.print(f"written to {folder / 'evaluations.jsonl'}", soft_wrap=True)
