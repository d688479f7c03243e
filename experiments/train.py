"""The host loop: run a cycle, fetch its metrics once, write them down, save now and then."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run, terminal, tracking
from experiments.presets import RunConfig, RunFailed
from experiments.run import Setup
from experiments.stop import SAVED, Stop
from experiments.terminal import STAGES, console
from experiments.tracking import Tracker, to_rows
from jmql.checkpoint import Checkpoints
from jmql.train import TrainState

Save = Callable[[TrainState, int, bool], None]
Rows = list[dict[str, Any]]  # what metrics.jsonl says of one cycle, a row for each seed


def train(config: RunConfig) -> int:
    """Meta-trains, adapts and evaluates, from the start or from where a run stopped.

    Returns:
        The exit code: 0, or `stop.SAVED` after a signal.

    Raises:
        ConfigError: the configuration cannot work; nothing has been written.
        RunFailed: anything else that ends the run early.
    """
    if config.resume:
        folder = Path(config.resume)
        setup = run.load(folder, dataclasses.replace(config, resume=""))
    else:
        setup = run.setup(config)
        folder = run.create(setup)
    again = f"make train RESUME={folder}"
    with (
        run.locked(folder),
        run.logged(folder),
        Stop(again) as stop,
        run.checkpoints(folder, setup.config) as checkpoints,
    ):
        try:
            state, damaged = run.restore(folder, setup, checkpoints)
            checkpoints.drop(damaged)
        except FileNotFoundError:
            if any(row["updates"] for row in tracking.read(folder)):
                raise RunFailed(
                    f"{folder} has results but no checkpoint; nothing has been changed"
                ) from None
            state = jax.jit(setup.init)(setup.keys)
        steps, total = int(state.env_steps[0]), setup.config.total_steps
        header(setup, folder, steps)
        if steps < total:
            steps = go_on(setup, folder, state, checkpoints, stop)
        if steps < total:
            console.print(f"stopped by {stop.signal} and saved at {steps:,} of {total:,} steps")
            console.print(f"run: {folder} · next: {again}", soft_wrap=True)
            return SAVED
        report(setup, tracking.read(folder))
    console.print(f"run: {folder} · next: make evaluate RUN={folder}", soft_wrap=True)
    return 0


def go_on(
    setup: Setup, folder: Path, state: TrainState, checkpoints: Checkpoints, stop: Stop
) -> int:
    """Trains from a state to the end or to a signal; returns the environment steps reached."""
    started, config = time.monotonic(), setup.config
    record = run.write_record(folder, config)
    cycle, compile_seconds = stop.wait(compiled, setup)
    with Tracker(folder, config, record, int(state.env_steps[0])) as tracker:
        save = saver(folder, config, checkpoints)
        stop.ready = True
        try:
            steps = loop(setup, cycle, state, tracker, save, stop, compile_seconds)
        except FloatingPointError as error:
            raise RunFailed(
                f"{error}; the last good checkpoint is {last_good(checkpoints)}, every setting is"
                f" in {folder / 'config.json'}"
            ) from error
        stop.saved = True
        if steps < config.total_steps:
            tracker.exit_code = SAVED
        else:
            rows = tracking.read(folder)[-config.seeds :]
            tracker.tasks(["task", *STAGES], per_task(setup, rows))
    console.print(
        f"trained for {terminal.human_time(time.monotonic() - started)};"
        f" W&B: {', '.join(tracker.urls) or tracker.wandb}"
    )
    return steps


def compiled(setup: Setup) -> tuple[Any, float]:
    """Returns the compiled cycle, and the seconds it took.

    Compiled ahead of time, the cycle cannot be traced again: other shapes are an error.
    """
    begun = time.monotonic()
    shapes = jax.eval_shape(setup.init, setup.keys)
    with console.status("compiling the cycle (kept for the next run of these shapes)"):
        lowered = jax.jit(setup.cycle, donate_argnums=0).lower(
            shapes, jnp.int32(0), jnp.zeros((), bool)
        )
        cycle = lowered.compile()
    seconds = time.monotonic() - begun
    console.print(f"compiled in {seconds:.0f} s")
    return cycle, seconds


def loop(
    setup: Setup,
    cycle: Any,
    state: TrainState,
    tracker: Tracker,
    save: Save,
    stop: Stop,
    compile_seconds: float,
) -> int:
    """Runs cycles until the configured number of steps or a signal.

    Args:
        setup: what is trained.
        cycle: compiled; takes the state, rounds [] and warm-up [].
        state: leaves [S, ...]; donated.
        tracker: takes the rows of every cycle.
        save: called after every cycle, once its rows are written, with the state, its steps, and
            whether it must be saved now.
        stop: looked at after every cycle.
        compile_seconds: for the metrics.

    Returns:
        Environment steps of the last state, which has been saved.

    Raises:
        FloatingPointError: a metric is not a finite number; the message names it.
        RunFailed: the state could not be saved.
    """
    config = setup.config
    per_round, updates = config.steps_per_round, config.train.updates_per_round
    total, done = config.total_steps // per_round, int(state.env_steps[0]) // per_round
    fill = not state.memory.size.any()  # also where the replay was not saved
    begun, first, stopping = time.monotonic(), done, False
    with terminal.Bar(config.task, total * per_round, done * per_round) as bar:
        while done < total and not stopping:
            warmup = -(-config.collect.warmup_steps // per_round)
            rounds = min(warmup if fill else config.train.rounds_per_cycle, total - done)
            before = time.monotonic()
            state, metrics, of_tasks = stop.wait(fetched, cycle, state, rounds, fill)
            seconds = time.monotonic() - before
            done += rounds
            speed = {
                "time/env_steps_per_second": config.seeds * rounds * per_round / seconds,
                "time/updates_per_second": config.seeds * (not fill) * rounds * updates / seconds,
                "time/compile_seconds": compile_seconds,
            }
            metrics |= {name: np.full(config.seeds, value) for name, value in speed.items()}
            metrics |= {f"tasks/{stage}": of_tasks[stage] for stage in STAGES}
            refuse_nonfinite(metrics, config)
            if fill:  # nothing has been learned yet
                metrics = {k: v for k, v in metrics.items() if not k.startswith("train/")}
                begun, first = time.monotonic(), done
            tracker.log(to_rows(metrics))
            stopping = bool(stop.signal)  # read once: what comes later stops the next cycle
            save(state, done * per_round, fill or done == total or stopping)
            bar.update(
                done * per_round,
                metrics["eval/return_pre"].mean(),
                metrics["eval/return_post"].mean(),
                speed["time/updates_per_second"],
                None if fill else (time.monotonic() - begun) * (total - done) / (done - first),
            )
            fill = False
    return done * per_round


def fetched(cycle: Any, state: TrainState, rounds: int, fill: bool) -> Any:
    """Runs one cycle; returns its state, on device, and its results, fetched at once."""
    state, *results = cycle(state, jnp.int32(rounds), jnp.asarray(fill))
    return state, *jax.device_get(results)


def refuse_nonfinite(metrics: Mapping[str, np.ndarray], config: RunConfig) -> None:
    """Raises FloatingPointError that names the first metric [S, ...] that is not a finite number.

    Only `collect/return` may be NaN: where no episode ended there is no return.
    """
    # What learns comes first: the rest follows from it.
    for name in sorted(metrics, key=lambda name: (not name.startswith("train/"), name)):
        bad = ~np.isfinite(metrics[name].reshape(config.seeds, -1)).all(axis=1)
        if name != "collect/return" and bad.any():
            raise FloatingPointError(
                f"{name} of seed {run.seeds(config)[int(bad.argmax())]} is not finite after the"
                f" cycle that ended at {int(metrics['env_steps'][0]):,} steps, which is not logged"
                f" (td3.learning_rate {config.td3.learning_rate:g}, adapt.learning_rate"
                f" {config.adapt.learning_rate:g})"
            )


def saver(folder: Path, config: RunConfig, checkpoints: Checkpoints) -> Save:
    """Returns a function of (state, steps, now) that saves by the clock, or at once.

    Raises:
        RunFailed: a save failed; the message says what is needed and what there is.
    """
    last = -math.inf

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
            free = terminal.human_bytes(shutil.disk_usage(folder).free)
            need = terminal.human_bytes(terminal.size(kept))
            reason = str(error).strip().partition("\n")[0]
            raise RunFailed(
                f"the state at {steps:,} steps could not be saved: {reason} (up to {need} are"
                f" needed, {free} are free); the last good checkpoint is"
                f" {last_good(checkpoints)}, from which make train RESUME={folder} goes on"
            ) from error

    return save


def last_good(checkpoints: Checkpoints) -> str:
    """Says which checkpoint a run can go on from."""
    step = checkpoints.newest()
    return "none" if step is None else f"of {step:,} steps"


def per_task(setup: Setup, rows: Rows) -> list[list[list[Any]]]:
    """Returns for every seed a row for each held-out task: its name and returns."""
    names = terminal.task_names(setup.held_out)
    return [
        [[name, *(row[f"tasks/{stage}"][k] for stage in STAGES)] for k, name in enumerate(names)]
        for row in rows
    ]


def header(setup: Setup, folder: Path, steps: int) -> None:
    """Prints what is about to run, with the memory of replay and the update-to-data ratio."""
    config = setup.config
    device = jax.devices()[0]
    state = jax.eval_shape(setup.init, setup.keys)
    transitions = config.seeds * config.collect.rows * config.slots_per_row
    replay = terminal.size(state.memory.data)
    console.print(
        f"[bold]{config.task}[/bold] · {config.profile} · backend {config.backend}"
        f" · {device.platform} {device.device_kind} x{jax.device_count()}"
        f" · JAX {jax.__version__}\n"
        f"seeds {config.seed}..{config.seed + config.seeds - 1}"
        f" · {config.tasks.train} training and {config.tasks.held_out} held-out tasks"
        f" · {config.collect.rows} rows x {config.collect.unroll} steps a round\n"
        f"replay {terminal.human_bytes(replay)} for {transitions:,} transitions"
        f" ({replay / transitions:.0f} bytes each)"
        f" · {config.update_to_data:g} updates per environment step\n"
        f"{f'going on at {steps:,} steps, ' if steps else ''}writing to {folder}",
        soft_wrap=True,
    )


def report(setup: Setup, rows: Rows) -> None:
    """Prints the returns of the run: untrained, before adaptation, after each of its steps.

    Args:
        setup: what was trained.
        rows: the whole of metrics.jsonl.
    """
    config = setup.config
    first, last = rows[: config.seeds], rows[-config.seeds :]

    def cells(name: str, pick: Any = lambda x: x) -> list[str]:
        """One stage after the other, of a metric that `pick` makes a number."""
        untrained = [pick(row[f"{name}/return_pre"]) for row in first]
        stages = [[pick(row[f"{name}/{stage}"]) for row in last] for stage in STAGES]
        return [mean_and_spread(values) for values in (untrained, *stages)]

    table = [("mean", cells("eval"))]
    names = terminal.task_names(setup.held_out)
    for k, name in enumerate(names if len(names) <= 4 else []):
        table.append((name, cells("tasks", lambda x, k=k: x[k])))
    worst = mean_and_spread([row["eval/return_post_p20"] for row in last])
    table.append(("worst fifth", ["", "", "", worst]))
    terminal.table(
        f"return on {config.tasks.held_out} held-out tasks after {last[0]['env_steps']:,} steps"
        + (f", mean ± std over {config.seeds} seeds" if config.seeds > 1 else ""),
        ["untrained", *STAGES.values()],
        table,
    )
    terminal.warn_if_reuse_is_off(np.mean([row["adapt/beta_zero_share"] for row in last]))


def mean_and_spread(values: list[float]) -> str:
    """Returns `12.3`, or `12.3 ± 4.5` for the values of several seeds."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"
