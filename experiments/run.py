"""A run's directory: what `train` writes and `evaluate` reads back."""

import contextlib
import dataclasses
import datetime
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import secrets
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments import devices
from experiments.checkpoint import Checkpoints, Mismatch, Unreadable
from experiments.config import RunConfig, RunFailed, all_seeds, from_json, identity
from experiments.program import Program, build, named
from experiments.terminal import console
from jmql.keys import derive
from jmql.settings import ConfigError, Kind, flatten
from jmql.train import TrainState

_CONFIG, _TASKS = "config.json", "tasks.npz"
FAILED = "failed.txt"  # why a run cannot go on
REPORT = "report.html"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx")


def folder_of(config: RunConfig, run_id: str) -> Path:
    """Returns where a run of a name is. A family from outside is called by its class."""
    return Path(config.runs) / config.task.rpartition(":")[2] / run_id


def exists(folder: Path) -> bool:
    """Returns whether a folder holds a run: config.json is what is written last."""
    return (folder / _CONFIG).exists()


def create(program: Program) -> Path:
    """Makes a run directory with tasks.npz and config.json, under its `run_id` if it has one.

    Raises:
        RunFailed: the disk refuses.
    """
    config = program.config
    now = datetime.datetime.now(datetime.UTC)
    parent = folder_of(config, "")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            new = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            folder = parent / (config.run_id or new)
            with contextlib.suppress(FileExistsError):
                # What a name's process did not finish to make is made again.
                folder.mkdir(exist_ok=bool(config.run_id))
                break
        tasks = {"train": program.train_tasks, "held_out": program.held_out}
        np.savez(folder / _TASKS, allow_pickle=False, **_by_name(tasks))
        write_record(folder, config)
    except OSError as error:
        raise RunFailed(f"no run directory can be made in {parent}: {error}") from None
    return folder


def remove(folder: Path) -> None:
    """Removes what `create` has made, and what came after; not what a sweep writes beside it."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in (_CONFIG, _TASKS, REPORT, "log.txt"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is there
        folder.rmdir()


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


def group(run: RunConfig) -> str:
    """Returns what runs that differ in nothing but their seeds have in common: W&B's group."""
    same = json.dumps(but_for_seeds(run), sort_keys=True)
    return f"{run.task}-{run.profile}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"


def but_for_seeds(run: RunConfig) -> dict[str, Any]:
    """Returns the settings on which results depend, by their dotted names, without the seeds."""
    same = flatten(run, Kind.LEARNED) | flatten(run, Kind.MEASURED)
    if run.algorithm == "p3o":  # its learning rate falls to 0 there
        same["train.env_steps"] = run.train.env_steps
    return {name: value for name, value in same.items() if name not in ("seed", "seeds")}


def describe(run: RunConfig) -> dict[str, Any]:
    """Returns what config.json holds: every setting, and where and with what it runs."""
    settings = dataclasses.asdict(run)
    device, jax_config = jax.devices()[0], cast(Any, jax.config)
    return {
        "config": settings,
        "group": group(run),
        "git_commit": _git_commit(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": device.device_kind,
        "device_count": devices.choose(run).size,
        "platform": device.platform,
        "backend": run.backend,
        "seeds": list(all_seeds(run)),
        "matmul_precision": jax_config.jax_default_matmul_precision or "default",
    }


def read_config(folder: Path) -> RunConfig:
    """Reads config.json of a run directory.

    Raises:
        ConfigError: the folder is not a run directory.
    """
    path = folder / _CONFIG
    try:
        settings = json.dumps(json.loads(path.read_bytes())["config"])
    except OSError as error:
        raise _not_a_run(folder, error) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    try:
        config = from_json(settings)
        config.validate()
        return config
    except ConfigError as error:
        raise _damaged(path, error) from None


def load(folder: Path, config: RunConfig, held_out_at_once: int | None = None) -> Program:
    """Returns the program of a run directory, with the tasks that it saved.

    Args:
        folder: the run directory.
        config: its configuration, in which what `identity` leaves out may have changed.
        held_out_at_once: as for `build`.

    Raises:
        ConfigError: the folder is not a run directory.
    """
    refuse_unnamed(folder, config)
    return with_tasks(folder, build(config, held_out_at_once))


def refuse_unnamed(folder: Path, config: RunConfig) -> None:
    """Raises ConfigError if the configuration of a run directory names what there is not."""
    try:
        named(config)
    except ConfigError as error:  # of identity, which is config.json's
        raise ConfigError(f"{folder / _CONFIG}: {error}") from None


def with_tasks(folder: Path, program: Program) -> Program:
    """Returns a program with the tasks that a run directory saved.

    Raises:
        ConfigError: they are not what such a run has written.
    """
    tasks = {"train": program.train_tasks, "held_out": program.held_out}
    path = folder / _TASKS
    try:
        with np.load(path) as file:
            leaves = {name: file[name] for name in _by_name(tasks)}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    for name, drawn in _by_name(tasks).items():
        saved = leaves[name]
        if (saved.shape, saved.dtype) != (drawn.shape, drawn.dtype):
            raise ConfigError(
                f"{path} is not what a run of {folder / _CONFIG} has written: {name} is"
                f" {saved.dtype}{list(saved.shape)} and should be {drawn.dtype}{list(drawn.shape)}"
            )
        if not np.isfinite(saved).all():
            raise _damaged(path, f"{name} is not finite")
    tasks = jax.tree.unflatten(
        jax.tree.structure(tasks), [jnp.asarray(leaf) for leaf in leaves.values()]
    )
    return dataclasses.replace(program, train_tasks=tasks["train"], held_out=tasks["held_out"])


def _damaged(path: Path, what: object) -> ConfigError:
    return ConfigError(f"{path} is not what a run has written: {str(what) or 'empty'}")


def _not_a_run(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder} is not a run directory ({error}); valid: a folder runs/<task>/<run_id>"
        f"{_nearest_run(folder)}"
    )


def checkpoints(folder: Path, config: RunConfig, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of a run directory."""
    defaults = identity(RunConfig())
    return Checkpoints(folder / "checkpoints", identity(config), defaults, read_only)


def saved(config: RunConfig, state: TrainState) -> TrainState:
    """Returns what a checkpoint holds of a state [S, ...]: all, or all but replay and rows."""
    return state if config.checkpoint.replay else state.replace(memory=None, actors=None)


def restore(
    folder: Path, program: Program, files: Checkpoints, up_to: float = math.inf
) -> tuple[TrainState, int]:
    """Reads the newest TrainState [S, ...] that is whole. Without its replay, that is empty.

    Args:
        folder: the run directory.
        program: of the run.
        files: its checkpoints.
        up_to: the step of the newest that counts.

    Returns:
        The state, and its step.

    Raises:
        FileNotFoundError: there is no checkpoint yet.
        ConfigError: the checkpoint is another run's.
        RunFailed: there are checkpoints, and none can be read.
    """
    like = saved(program.config, program.shapes)
    complaints = io.StringIO()  # of tensorstore's threads about a torn file
    try:
        with contextlib.redirect_stderr(complaints):
            found = files.restore(like, up_to)
    except Mismatch as error:
        raise ConfigError(f"the checkpoint in {folder} is of another run: {error}") from None
    except Unreadable as error:
        raise RunFailed(f"no checkpoint in {folder} can be read: {error}") from None
    for step, why in found.damaged.items():
        console.print(f"checkpoint {step} is damaged ({why}); using the one before")
    if program.config.checkpoint.replay:
        return found.state, found.step
    kept = {name: getattr(found.state, name) for name in ("agent", "key", "rounds")}
    keys = jax.vmap(lambda key: derive(key, "rows anew"))(found.state.key)
    return program.init(keys).replace(**kept), found.step


def trained(folder: Path, program: Program) -> TrainState:
    """Reads the newest TrainState [S, ...] of a run, which may still be training.

    Raises:
        ConfigError: the run has no checkpoint, or another run's.
        RunFailed: there are checkpoints, and none can be read.
    """
    with checkpoints(folder, program.config, read_only=True) as files:
        try:
            return restore(folder, program, files)[0]
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
