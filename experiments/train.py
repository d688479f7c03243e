"""Trains a run, from the start or from where it stopped, and says what came of it."""

import dataclasses
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from experiments import guard, loop, memory, run, terminal, tracking
from experiments.checkpoint import Checkpoints
from experiments.config import RunConfig, RunFailed, all_seeds, refuse_other
from experiments.program import Program, build
from experiments.stop import SAVED, Stop
from experiments.terminal import console
from experiments.tracking import Tracker
from jmql.settings import ConfigError
from jmql.train import TrainState


def train(config: RunConfig, stop: Stop) -> int:
    """Meta-trains, adapts and evaluates, from the start or from where a run stopped.

    Args:
        config: of the run.
        stop: entered.

    Returns:
        The exit code: 0, or `stop.SAVED` after a signal.

    Raises:
        ConfigError: the configuration cannot work; nothing has been written.
        RunFailed: anything else that ends the run early.
    """
    program, folder = opened(config)
    stop.again = f"make train RESUME={shlex.quote(str(folder))}"
    with (
        guard.locked(folder),
        guard.logged(folder),
        run.checkpoints(folder, program.config) as checkpoints,
    ):
        per_round, total = program.config.steps_per_round, program.config.total_rounds
        try:
            state, damaged = run.restore(folder, program, checkpoints)
        except FileNotFoundError:
            if any(row["updates"] for row in tracking.read(folder)):
                raise RunFailed(
                    f"{folder} has results but no checkpoint; nothing has been changed"
                ) from None
            state, damaged = program.init(program.keys), []
        done = int(state.rounds[0])
        if done:
            refuse_shorter(program.config, folder, done)
            rows_of(program, folder, done * per_round)  # before more are added
        checkpoints.drop(damaged)
        terminal.header(program, folder, done * per_round)
        if done < total:
            done = go_on(program, folder, state, checkpoints, stop)
        if done < total:
            console.print(
                f"stopped by {stop.signal} and saved at {done * per_round:,} of"
                f" {total * per_round:,} steps"
            )
            console.print(f"run: {folder} · next: {stop.again}", soft_wrap=True)
            return SAVED
        terminal.report(program, rows_of(program, folder, done * per_round))
    console.print(
        f"run: {folder} · next: make evaluate RUN={shlex.quote(str(folder))}", soft_wrap=True
    )
    return 0


def opened(config: RunConfig) -> tuple[Program, Path]:
    """Returns the program and the directory of a run: one that goes on, or a new one.

    Raises:
        ConfigError: the configuration cannot work, or would learn under something else.
        RunFailed: the disk refuses.
    """
    named = run.folder_of(config, config.run_id) if config.run_id else None
    folder = Path(config.resume) if config.resume else named
    if folder is None or (not config.resume and not run.exists(folder)):
        program = build(config)
        return program, run.create(program)
    refuse_other(config, run.read_config(folder), folder)
    program = run.load(folder, dataclasses.replace(config, resume=""))
    guard.refuse_unwritable(folder)
    return program, folder


def go_on(
    program: Program, folder: Path, state: TrainState, checkpoints: Checkpoints, stop: Stop
) -> int:
    """Trains from a state to the end or to a signal; returns the rounds reached."""
    started, config = time.monotonic(), program.config
    refuse_endless_refill(program, state)
    record = run.write_record(folder, config)
    cycle, compile_seconds = stop.wait(compiled, program)
    saving = memory.size(run.saved(config, program.shapes)) if jax.default_backend() == "cpu" else 0
    try:
        memory.refuse_too_much(
            f"beside its state, a cycle of this run ({memory.SETTINGS}, tasks.held_out and seeds"
            " make it)",
            memory.in_one(memory.of_program(cycle), program.mesh) + saving,
        )
    except ConfigError:
        if checkpoints.newest() is None:  # the lock is ours, and nothing has been learned here
            shutil.rmtree(folder, ignore_errors=True)
        raise
    steps = int(state.rounds[0]) * config.steps_per_round
    with Tracker(folder, config, record, steps) as tracker:
        save = saver(folder, config, checkpoints)
        stop.ready = True
        try:
            done = loop.loop(program, cycle, state, tracker, save, stop, compile_seconds)
        except FloatingPointError as error:
            raise RunFailed(
                f"{error}; the last good checkpoint is {last_good(checkpoints)}, every setting is"
                f" in {folder / 'config.json'}"
            ) from error
        stop.saved = True
        if done < config.total_rounds:
            tracker.exit_code = SAVED
        else:
            rows = tracking.read(folder)[-config.seeds :]
            tracker.tasks(["task", *program.stages], per_task(program, rows))
    console.print(
        f"trained for {terminal.human_time(time.monotonic() - started)};"
        f" W&B: {', '.join(tracker.urls) or tracker.wandb}",
        soft_wrap=True,
    )
    return done


def refuse_shorter(config: RunConfig, folder: Path, done: int) -> None:
    """Raises ConfigError if a run has done more rounds than it is to have."""
    if done > config.total_rounds:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; {folder} is at"
            f" {done * config.steps_per_round:,} steps; valid: as many, or more"
        )


def refuse_endless_refill(program: Program, state: TrainState) -> None:
    """Raises ConfigError if a replay that was not saved takes all that is left of a run to fill."""
    config = program.config
    left = config.total_rounds - int(state.rounds[0])
    if loop.to_fill(config, state) >= left:
        raise ConfigError(
            f"train.env_steps is {config.train.env_steps}; {left} rounds are left, and the replay,"
            f" which was not saved, takes {loop.to_fill(config, state)} to fill; valid: a longer"
            " run"
        )


def compiled(program: Program) -> tuple[jax.stages.Compiled, float]:
    """Returns the compiled cycle, and the seconds it took."""
    begun = time.monotonic()
    with console.status("compiling the cycle (kept for the next run of these shapes)"):
        cycle = program.compile()
    seconds = time.monotonic() - begun
    console.print(f"compiled in {seconds:.0f} s")
    return cycle, seconds


def saver(folder: Path, config: RunConfig, checkpoints: Checkpoints) -> loop.Save:
    """Returns a function of (state, steps, now) that saves by the clock, or at once.

    Raises:
        RunFailed: a save failed; the message says what is needed and what there is.
    """
    last = time.monotonic()

    def save(state: TrainState, steps: int, now: bool) -> None:
        nonlocal last
        kept = run.saved(config, state)
        try:
            checkpoints.check()
            if now or time.monotonic() - last >= 60 * config.checkpoint.minutes:
                checkpoints.save(steps, kept)
                last = time.monotonic()
            if now:
                checkpoints.wait()
        except Exception as error:  # orbax passes on what the file system and tensorstore raise
            free = memory.human_bytes(shutil.disk_usage(folder).free)
            need = memory.human_bytes(memory.size(kept))
            reason = str(error).strip().partition("\n")[0]
            raise RunFailed(
                f"the state at {steps:,} steps could not be saved: {reason} (up to {need} are"
                f" needed, {free} are free); the last good checkpoint is"
                f" {last_good(checkpoints)}, from which make train"
                f" RESUME={shlex.quote(str(folder))} goes on"
            ) from error

    return save


def last_good(checkpoints: Checkpoints) -> str:
    """Says which checkpoint a run can go on from."""
    step = checkpoints.newest()
    return "none" if step is None else f"of {step:,} steps"


def per_task(program: Program, rows: list[dict[str, Any]]) -> list[list[list[Any]]]:
    """Returns for every seed a row for each held-out task: its name and returns."""
    names = terminal.task_names(program.env, program.held_out)
    return [
        [
            [name, *(row[f"tasks/{stage}"][k] for stage in program.stages)]
            for k, name in enumerate(names)
        ]
        for row in rows
    ]


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
