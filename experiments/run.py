"""A run and its directory: what `train` writes and `evaluate` reads back."""

import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.metadata
import json
import logging
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.base import Environment
from experiments import presets
from experiments.presets import RunConfig, RunFailed
from jmql import checkpoint, config, evaluate, networks, train
from jmql.config import ConfigError
from jmql.networks import Networks
from jmql.types import Task

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration and what it names, ready to be compiled."""

    config: RunConfig
    env: Environment
    networks: Networks
    train_tasks: Task  # leaves [config.tasks.train, ...]
    held_out: Task  # leaves [K, ...]

    def init(self, keys: jax.Array) -> Any:
        """Returns the TrainState of every seed, leaves [S, ...], for keys [S]."""
        one = functools.partial(train.init, self.config, self.env, self.networks, self.train_tasks)
        return jax.vmap(one)(keys)

    def cycle(self, state: Any, rounds: jax.Array, warmup: jax.Array) -> Any:
        """Runs `evaluate.cycle` for every seed, leaves of state and results [S, ...]."""
        one = functools.partial(evaluate.cycle, self.config, self.env, self.networks, self.held_out)
        return jax.vmap(one, in_axes=(0, None, None))(state, rounds, warmup)

    @property
    def keys(self) -> jax.Array:
        """The key of every seed, [S]."""
        return jnp.stack([jax.random.key(seed) for seed in seeds(self.config)])


def seeds(run: RunConfig) -> range:
    """The seeds of a run, in the order of its leading axis S."""
    return range(run.seed, run.seed + run.seeds)


def setup(run: RunConfig) -> Setup:
    """Builds environment, networks and tasks.

    Raises:
        ConfigError: the configuration cannot work.
    """
    config.validate(run)
    if run.seed < 0 or run.seeds < 1:
        raise ConfigError(f"seed is {run.seed} and seeds is {run.seeds}; valid: from 0 and from 1")
    try:
        env = envs.make(run.task, run.backend, observe_task=run.observe_task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    # One key for both draws, so that no held-out task is a training task (but see `-dir`).
    train_key, held_out_key = jax.random.split(jax.random.key(run.tasks.seed))
    return Setup(
        run,
        env,
        networks.make(run.network, env.action_size),
        env.sample_tasks(train_key, run.tasks.train),
        env.sample_tasks(held_out_key, run.tasks.held_out),
    )


def create(setup: Setup) -> tuple[Path, dict[str, Any]]:
    """Makes a run directory with config.json and tasks.npz; returns it and the former's content."""
    now = datetime.datetime.now(datetime.UTC)
    run_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(setup.config.runs) / setup.config.task / run_id
    folder.mkdir(parents=True)
    record = describe(setup.config)
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    tasks = {"train": setup.train_tasks, "held_out": setup.held_out}
    leaves = jax.tree_util.tree_leaves_with_path(tasks)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in leaves}
    np.savez(folder / "tasks.npz", allow_pickle=False, **named)
    return folder, record


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Sends warnings, and the traceback of an error, to log.txt of a folder.

    Raises:
        RunFailed: the error in one line.
    """
    handler = logging.FileHandler(folder / "log.txt", delay=True, encoding="utf-8")
    logging.getLogger().addHandler(handler)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        logging.exception("the run failed")
        summary = str(error).strip().partition("\n")[0]
        raise RunFailed(
            f"{type(error).__name__}: {summary}; traceback in {folder / 'log.txt'}"
        ) from error
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def describe(run: RunConfig) -> dict[str, Any]:
    """Returns what config.json holds: every setting, and where and with what it runs."""
    settings = dataclasses.asdict(run)
    same = {k: v for k, v in settings.items() if k not in ("seed", "seeds", "runs", "tracking")}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    device, jax_config = jax.devices()[0], cast(Any, jax.config)
    return {
        "config": settings,
        "group": f"{run.task}-{run.profile}-{digest}",
        "git_commit": _git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "platform": device.platform,
        "backend": run.backend,
        "seeds": list(seeds(run)),
        "matmul_precision": jax_config.jax_default_matmul_precision or "default",
    }


def load(folder: Path) -> Setup:
    """Reads the configuration of a run directory.

    Raises:
        ConfigError: the folder is not a run directory.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return setup(presets.from_dict(RunConfig(), record["config"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder} is not a run directory ({error}); valid: a folder runs/<task>/<run_id>"
            f"{_nearest_run(folder)}"
        ) from None


def restore(folder: Path, setup: Setup) -> Any:
    """Reads the newest TrainState [S, ...] of a run.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    like = jax.eval_shape(setup.init, setup.keys)
    try:
        return checkpoint.restore(folder / "checkpoints", like)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; the run has not finished") from None


def _nearest_run(folder: Path) -> str:
    runs = [str(path.parent) for path in Path("runs").glob("*/*/config.json")]
    near = difflib.get_close_matches(str(folder), runs, n=1, cutoff=0)
    return f", such as {near[0]}" if near else ""


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
