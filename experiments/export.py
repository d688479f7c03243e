"""Writes a trained run as one file, to act and adapt with elsewhere."""

from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import run
from experiments.config import RunConfig, RunFailed, all_seeds
from experiments.memory import human_bytes
from experiments.program import task_size
from experiments.terminal import console
from jmql.config import Config
from jmql.policy import TrainedPolicy
from jmql.replay import ReplayState
from jmql.settings import ConfigError


def export(folder: Path, config: RunConfig, out: Path, seed: int | None, replay: int) -> None:
    """Writes the agent of a run, its settings and a part of its replay.

    Args:
        folder: a run directory.
        config: its configuration.
        out: the file.
        seed: which of the run's; None: the first.
        replay: about so many of the newest transitions, for adaptation; 0: none.

    Raises:
        ConfigError: the folder is not a finished run, or has no such seed or no replay.
        RunFailed: the file cannot be written.
    """
    if config.algorithm != "mql":
        raise ConfigError(
            f"{folder} is of algorithm {config.algorithm}; valid: a run of mql, for a file is a"
            " policy that adapts"
        )
    seeds = all_seeds(config)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise ConfigError(f"seed is {seed}; valid: one of {folder}, {seeds[0]} to {seeds[-1]}")
    if replay and not config.checkpoint.replay:
        raise ConfigError(
            f"{folder} was saved without its replay (checkpoint.replay False); valid: --replay 0"
        )
    program = run.load(folder, config)
    state = jax.tree.map(lambda x: x[seeds.index(seed)], run.trained(folder, program))
    # All but the oldest of a row have a whole history.
    slots = config.network.history_length + -(-replay // config.collect.rows) if replay else 0
    memory = newest(state.memory, slots)
    env, record = program.env, run.describe(config)
    about = {
        "task": config.task,
        "backend": config.backend,
        "seed": seed,
        "env_steps": int(state.rounds) * config.steps_per_round,
        "observation_size": env.observation_size,
        "action_size": env.action_size,
        "task_size": task_size(env),
        "episode_length": env.episode_length,
        "slots_per_row": memory.data.reward.shape[1],
        "versions": record["versions"],
    }
    numbers = Config(**{item.name: getattr(config, item.name) for item in Config().items()})
    policy = TrainedPolicy(numbers, state.agent, state.agent, memory, (), about)
    try:
        policy.save(out)
    except OSError as error:
        raise RunFailed(f"{out} cannot be written: {error}") from None
    console.print(
        f"{config.task} after {about['env_steps']:,} steps, seed {seed}, with"
        f" {memory.data.reward.size:,} transitions: {human_bytes(out.stat().st_size)}"
    )
    console.print(f'policy: {out} · next: jmql.load("{out}")', soft_wrap=True)


def newest(memory: ReplayState, slots: int) -> ReplayState:
    """Returns the newest steps of every row, [E, slots], as a replay of its own, which is full."""
    slots = min(slots, int(memory.size))
    places = (memory.cursor - slots + jnp.arange(slots)) % memory.data.reward.shape[1]
    data = jax.tree.map(lambda ring: ring[:, places], memory.data)
    return ReplayState(data, jnp.int32(0), jnp.int32(slots))
