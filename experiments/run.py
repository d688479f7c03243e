"""A run and its directory: what `train` writes and `evaluate` reads back."""

import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.base import Environment
from experiments import memory, presets
from experiments.presets import RunConfig, RunFailed
from experiments.terminal import console
from jmql import config, evaluate, networks, train
from jmql.checkpoint import Checkpoints, Mismatch, Unreadable
from jmql.config import LARGEST_SEED, ConfigError
from jmql.keys import derive
from jmql.networks import Networks
from jmql.train import TrainState
from jmql.types import Task

_CONFIG, _TASKS = "config.json", "tasks.npz"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration and what it names, ready to be compiled."""

    config: RunConfig
    env: Environment
    networks: Networks
    train_tasks: Task  # leaves [config.tasks.train, ...]
    held_out: Task  # leaves [K, ...]
    held_out_ranges: dict[str, tuple[float, float]]  # what they were drawn from
    shapes: TrainState  # of every seed, leaves [S, ...]

    def init(self, keys: jax.Array) -> Any:
        """Returns the TrainState of every seed, leaves [S, ...], for keys [S]."""
        one = functools.partial(train.init, self.config, self.env, self.networks, self.train_tasks)
        return jax.vmap(one)(keys)

    def cycle(self, state: Any, rounds: jax.Array, warmup: jax.Array, measured: jax.Array) -> Any:
        """Runs `evaluate.cycle` for every seed, leaves of state and results [S, ...]."""
        one = functools.partial(evaluate.cycle, self.config, self.env, self.networks, self.held_out)
        updates = state.agent.updates[0]  # of every seed
        return jax.vmap(one, in_axes=(0, *[None] * 4))(state, rounds, warmup, measured, updates)

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
    if run.seeds < 1 or not 0 <= run.seed <= LARGEST_SEED + 1 - run.seeds:
        raise ConfigError(
            f"seed is {run.seed} and seeds is {run.seeds}; valid: at least one, from 0 to"
            f" {LARGEST_SEED:,}"
        )
    if not 0 <= run.checkpoint.minutes < float("inf"):
        raise ConfigError(
            f"checkpoint.minutes is {run.checkpoint.minutes}; it must be at least 0 and finite"
        )
    try:
        env = envs.make(run.task, run.backend, observe_task=run.observe_task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    train_ranges, held_out_ranges = split(env, run.task, run.split)
    train_ranges |= explicit(env, run.task, run.tasks.train_ranges)
    held_out_ranges |= explicit(env, run.task, run.tasks.held_out_ranges)
    modules, key = networks.make(run.network, env.action_size), jax.random.key(run.tasks.seed)

    def draw(purpose: str, num: int, ranges: dict[str, Any]) -> Task:
        return env.sample_tasks(derive(key, purpose), num, ranges)

    def train_tasks() -> Task:
        return draw("training tasks", run.tasks.train, train_ranges)

    def held_out() -> Task:
        return draw("held-out tasks", run.tasks.held_out, held_out_ranges)

    def init(keys: jax.Array, tasks: Task) -> TrainState:
        return jax.vmap(functools.partial(train.init, run, env, modules, tasks))(keys)

    # Nothing is allocated before it is known to fit.
    keys = jax.ShapeDtypeStruct((run.seeds,), key.dtype)
    shapes = jax.eval_shape(init, keys, jax.eval_shape(train_tasks))
    count = memory.needed(run, env, shapes, run.tasks.held_out)
    count += memory.size(jax.eval_shape(held_out))
    memory.refuse_too_much(
        f"a run of seeds {run.seeds}, collect.rows {run.collect.rows}, collect.replay_capacity"
        f" {run.collect.replay_capacity} and tasks.held_out {run.tasks.held_out}",
        count,
    )
    return Setup(run, env, modules, train_tasks(), held_out(), held_out_ranges, shapes)


def split(env: Environment, task: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the ranges of training and of held-out tasks under a named split.

    Raises:
        ConfigError: the family has no such split.
    """
    known = {"iid": ({}, {}), **env.splits}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{task} has no split {name!r}; {hint}valid: {', '.join(known)}")
    train, held_out = known[name]
    return dict(train), dict(held_out)


def explicit(env: Environment, task: str, ranges: config.Ranges) -> dict[str, Any]:
    """Returns ranges as they are set by hand.

    Raises:
        ConfigError: the family has no such parameter, it is given twice, or its range is empty or
            beyond the family's limits.
    """
    given: dict[str, tuple[float, float]] = {}
    for name, low, high in ranges:
        if name not in env.ranges:
            valid = ", ".join(env.ranges) or "none, for its tasks are a fixed few"
            raise ConfigError(f"{task} draws no {name!r}; valid: {valid}")
        if name in given:
            raise ConfigError(f"the range of {name} is given twice; valid: once")
        lowest, highest = env.limits[name]
        if not lowest <= low <= high <= highest:
            raise ConfigError(
                f"the range of {name} is {low:g} to {high:g}; valid: within {lowest:g} to"
                f" {highest:g}"
            )
        if not np.float32(low) < np.float32(high):
            raise ConfigError(f"the range of {name} is {low:g} to {high:g}; it must rise")
        given[name] = (low, high)
    return given


def create(setup: Setup) -> Path:
    """Makes a run directory with config.json and tasks.npz.

    Raises:
        RunFailed: the disk refuses.
    """
    now = datetime.datetime.now(datetime.UTC)
    parent = Path(setup.config.runs) / setup.config.task
    try:
        while True:
            folder = parent / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
        tasks = {"train": setup.train_tasks, "held_out": setup.held_out}
        np.savez(folder / _TASKS, allow_pickle=False, **_by_name(tasks))
        write_record(folder, setup.config)
    except OSError as error:
        raise RunFailed(f"no run directory can be made in {parent}: {error}") from None
    return folder


def refuse_unwritable(folder: Path) -> None:
    """Raises RunFailed if no file can be made in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFailed(f"{folder} cannot be written to: {error}") from None


def write_record(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Writes config.json, whole or not at all, and returns its content."""
    record = describe(config)
    new = folder / f"{_CONFIG}.new"
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(folder / _CONFIG)
    return record


def _by_name(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a pytree by path, such as `train/goal`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in leaves}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run directory, until this one ends.

    Raises:
        ConfigError: another process is at it.
        RunFailed: the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another process is training in {folder}; valid: once it ends") from None
    except OSError as error:
        os.close(handle)
        raise RunFailed(f"{folder} cannot be locked: {error}") from None
    try:
        yield
    finally:
        os.close(handle)


class _LogFile(logging.FileHandler):
    """A log that a disk may refuse; what should be in it is then in the way of nothing."""

    def __init__(self, path: Path):
        super().__init__(path, delay=True, encoding="utf-8")
        self._path = path
        self.where = ""  # the traceback is, or why it is nowhere

    def emit(self, record: logging.LogRecord) -> None:
        self.where = f"traceback in {self._path}"
        try:
            super().emit(record)
        except OSError as error:  # it cannot be opened
            self.where = f"the traceback is lost ({error})"

    def handleError(self, _: logging.LogRecord) -> None:  # it cannot be written to
        self.where = f"the traceback is lost ({sys.exc_info()[1]})"


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Sends warnings, and the traceback of an error, to log.txt of a folder.

    Raises:
        RunFailed: the error in one line.
    """
    handler = _LogFile(folder / "log.txt")
    logging.getLogger().addHandler(handler)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        logging.exception("the run failed")
        summary = str(error)
        if not isinstance(error, RunFailed):
            summary = f"{type(error).__name__}: {summary.strip().partition(chr(10))[0]}"
        raise RunFailed(f"{summary}; {handler.where}") from error
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):  # the disk is full
            handler.close()


# What may change between a run and its resumption.
FREE = {"train.env_steps", "checkpoint.minutes", "runs", "resume"}
FREE |= {"tracking.wandb", "tracking.project"}


def identity(run: RunConfig) -> dict[str, Any]:
    """Returns the settings that a run keeps for its whole life, by name."""
    return {k: v for k, v in config.flatten(run).items() if k not in FREE}


def describe(run: RunConfig) -> dict[str, Any]:
    """Returns what config.json holds: every setting, and where and with what it runs."""
    settings = dataclasses.asdict(run)
    same = {k: v for k, v in identity(run).items() if k not in ("seed", "seeds")}
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


def read_config(folder: Path) -> RunConfig:
    """Reads config.json of a run directory.

    Raises:
        ConfigError: the folder is not a run directory.
    """
    try:
        record = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        settings = json.dumps(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_a_run(folder, error) from None
    try:
        return presets.from_json(settings)
    except ConfigError as error:
        raise ConfigError(f"{folder / _CONFIG} is not what a run has written: {error}") from None


def load(folder: Path, config: RunConfig) -> Setup:
    """Returns the set-up of a run directory, with the tasks that it saved.

    Args:
        folder: the run directory.
        config: its configuration, in which what `identity` leaves out may have changed.

    Raises:
        ConfigError: the folder is not a run directory.
    """
    new = setup(config)
    tasks = {"train": new.train_tasks, "held_out": new.held_out}
    path = folder / _TASKS
    try:
        with np.load(path) as file:
            leaves = {name: file[name] for name in _by_name(tasks)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _not_a_run(folder, error) from None
    for name, drawn in _by_name(tasks).items():
        saved = leaves[name]
        if (saved.shape, saved.dtype) != (drawn.shape, drawn.dtype):
            raise ConfigError(
                f"{path} is not what a run of {folder / _CONFIG} has written: {name} is"
                f" {saved.dtype}{list(saved.shape)} and should be {drawn.dtype}{list(drawn.shape)}"
            )
    tasks = jax.tree.unflatten(
        jax.tree.structure(tasks), [jnp.asarray(leaf) for leaf in leaves.values()]
    )
    return dataclasses.replace(new, train_tasks=tasks["train"], held_out=tasks["held_out"])


def _not_a_run(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder} is not a run directory ({error}); valid: a folder runs/<task>/<run_id>"
        f"{_nearest_run(folder)}"
    )


def checkpoints(folder: Path, config: RunConfig, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of a run directory."""
    return Checkpoints(folder / "checkpoints", identity(config), read_only)


def saved(config: RunConfig, state: TrainState) -> TrainState:
    """Returns what a checkpoint holds of a state [S, ...]: all, or all but replay and rows."""
    return state if config.checkpoint.replay else state.replace(memory=None, actors=None)


def restore(folder: Path, setup: Setup, files: Checkpoints) -> tuple[TrainState, list[int]]:
    """Reads the newest TrainState [S, ...] that is whole. Without its replay, that is empty.

    Returns:
        The state, and the steps of newer checkpoints, which are damaged.

    Raises:
        FileNotFoundError: there is no checkpoint yet.
        ConfigError: the checkpoint is another run's.
        RunFailed: there are checkpoints, and none can be read.
    """
    like = saved(setup.config, setup.shapes)
    complaints = io.StringIO()  # of tensorstore's threads about a torn file
    try:
        with contextlib.redirect_stderr(complaints):
            found = files.restore(like)
    except Mismatch as error:
        raise ConfigError(f"the checkpoint in {folder} is of another run: {error}") from None
    except Unreadable as error:
        raise RunFailed(f"no checkpoint in {folder} can be read: {error}") from None
    for step, why in found.damaged.items():
        console.print(f"checkpoint {step} is damaged ({why}); using the one before")
    damaged = list(found.damaged)
    if setup.config.checkpoint.replay:
        return found.state, damaged
    kept = {name: getattr(found.state, name) for name in ("agent", "key", "rounds")}
    keys = jax.vmap(lambda key: derive(key, "rows anew"))(found.state.key)
    return jax.jit(setup.init)(keys).replace(**kept), damaged


def trained(folder: Path, setup: Setup) -> TrainState:
    """Reads the newest TrainState [S, ...] of a run, which may still be training.

    Raises:
        ConfigError: the run has no checkpoint, or another run's.
        RunFailed: there are checkpoints, and none can be read.
    """
    with checkpoints(folder, setup.config, read_only=True) as files:
        try:
            return restore(folder, setup, files)[0]
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} has no checkpoint yet; valid: a run that has one"
            ) from None


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
