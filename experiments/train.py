"""The host loop: run a cycle, fetch its metrics once, write them down, save now and then."""

import dataclasses
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import memory, run, terminal, tracking
from experiments.presets import RunConfig, RunFailed
from experiments.run import Setup
from experiments.stop import SAVED, Stop
from experiments.terminal import STAGES, console
from experiments.tracking import Tracker, to_rows
from jmql.checkpoint import Checkpoints
from jmql.config import ConfigError
from jmql.train import TrainState

# Episodes whose physics was not finite, in training and in evaluation, and adaptations whose
# weights were not.
TROUBLES = ("collect/blew_up", "eval/blew_up", "adapt/failed")

Save = Callable[[TrainState, int, bool], None]
Rows = list[dict[str, Any]]  # what metrics.jsonl says of one cycle, a row for each seed


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
    if config.resume:
        folder = Path(config.resume)
        setup = run.load(folder, dataclasses.replace(config, resume=""))
        run.refuse_unwritable(folder)
    else:
        setup = run.setup(config)
        folder = run.create(setup)
    stop.again = f"make train RESUME={shlex.quote(str(folder))}"
    with (
        run.locked(folder),
        run.logged(folder),
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
        per_round, total = setup.config.steps_per_round, setup.config.total_rounds
        done = int(state.rounds[0])
        header(setup, folder, done * per_round)
        if done < total:
            done = go_on(setup, folder, state, checkpoints, stop)
        if done < total:
            console.print(
                f"stopped by {stop.signal} and saved at {done * per_round:,} of"
                f" {total * per_round:,} steps"
            )
            console.print(f"run: {folder} · next: {stop.again}", soft_wrap=True)
            return SAVED
        report(setup, folder)
    console.print(
        f"run: {folder} · next: make evaluate RUN={shlex.quote(str(folder))}", soft_wrap=True
    )
    return 0


def go_on(
    setup: Setup, folder: Path, state: TrainState, checkpoints: Checkpoints, stop: Stop
) -> int:
    """Trains from a state to the end or to a signal; returns the rounds reached."""
    started, config = time.monotonic(), setup.config
    record = run.write_record(folder, config)
    cycle, compile_seconds = stop.wait(compiled, setup)
    steps = int(state.rounds[0]) * config.steps_per_round
    with Tracker(folder, config, record, steps) as tracker:
        save = saver(folder, config, checkpoints)
        stop.ready = True
        try:
            done = loop(setup, cycle, state, tracker, save, stop, compile_seconds)
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
            tracker.tasks(["task", *STAGES], per_task(setup, rows))
    console.print(
        f"trained for {terminal.human_time(time.monotonic() - started)};"
        f" W&B: {', '.join(tracker.urls) or tracker.wandb}",
        soft_wrap=True,
    )
    return done


def compiled(setup: Setup) -> tuple[Any, float]:
    """Returns the compiled cycle, and the seconds it took.

    Compiled ahead of time, the cycle cannot be traced again: other shapes are an error.
    """
    begun = time.monotonic()
    flag = jnp.zeros((), bool)
    with console.status("compiling the cycle (kept for the next run of these shapes)"):
        lowered = jax.jit(setup.cycle, donate_argnums=0).lower(
            setup.shapes, jnp.int32(0), flag, flag
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
        cycle: compiled; takes the state, rounds [], warm-up [] and whether to evaluate [].
        state: leaves [S, ...]; donated.
        tracker: takes the rows of every cycle.
        save: called after every cycle, once its rows are written, with the state, its steps, and
            whether it must be saved now.
        stop: looked at after every cycle.
        compile_seconds: for the metrics.

    Returns:
        Rounds of the last state, which has been saved.

    Raises:
        FloatingPointError: a metric is not a finite number; the message names it.
        RunFailed: the state could not be saved.
    """
    config = setup.config
    per_round, updates = config.steps_per_round, config.train.updates_per_round
    total, done = config.total_rounds, int(state.rounds[0])
    # By what the replay holds, for it may not have been saved.
    filling = config.warmup_rounds - int(state.memory.size[0]) // config.collect.unroll
    begun, first, stopping = time.monotonic(), done, False
    with terminal.Bar(config.task, total * per_round, done * per_round) as bar:
        while done < total and not stopping:
            fill = filling > 0
            rounds = min(config.train.rounds_per_cycle, filling if fill else total - done)
            filling -= rounds
            # Warm-up in several cycles is evaluated once: they all are of the untrained agent.
            measured = filling <= 0
            before = time.monotonic()
            state, metrics, of_tasks = stop.wait(fetched, cycle, state, rounds, fill, measured)
            seconds = time.monotonic() - before
            done += rounds
            if not measured:
                stopping = bool(stop.signal)
                save(state, done * per_round, stopping)
                bar.advance(done * per_round)
                continue
            metrics["env_steps"] = metrics.pop("rounds").astype(np.int64) * per_round
            speed = {
                "time/env_steps_per_second": config.seeds * rounds * per_round / seconds,
                "time/updates_per_second": config.seeds * (not fill) * rounds * updates / seconds,
                "time/compile_seconds": compile_seconds,
            }
            metrics |= {name: np.full(config.seeds, value) for name, value in speed.items()}
            metrics |= {f"tasks/{stage}": of_tasks[stage] for stage in STAGES}
            metrics["tasks/failed"] = of_tasks["failed"].astype(int)
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
                terminal.troubles(*(metrics[name].sum() for name in TROUBLES)),
            )
    return done


def fetched(cycle: Any, state: TrainState, rounds: int, fill: bool, measured: bool) -> Any:
    """Runs one cycle; returns its state, on device, and its results, fetched at once."""
    state, *results = cycle(state, jnp.int32(rounds), jnp.asarray(fill), jnp.asarray(measured))
    return state, *jax.device_get(results)


def refuse_nonfinite(metrics: Mapping[str, np.ndarray], config: RunConfig) -> None:
    """Raises FloatingPointError that names the first `train/*` [S] that is not a finite number.

    What is measured may be missing: no episode ended, or no adaptation came to an end.
    """
    for name in sorted(name for name in metrics if name.startswith("train/")):
        bad = ~np.isfinite(metrics[name])
        if bad.any():
            raise FloatingPointError(
                f"{name} of seed {run.seeds(config)[int(bad.argmax())]} is not finite after the"
                f" cycle that ended at {int(metrics['env_steps'][0]):,} steps, which is not logged"
                f" (td3.learning_rate {config.td3.learning_rate:g})"
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
            need = terminal.human_bytes(memory.size(kept))
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
    transitions = config.seeds * config.collect.rows * config.slots_per_row
    replay = memory.size(setup.shapes.memory.data)
    console.print(config.task, style="bold", end="")
    console.print(
        f" · {config.profile} · backend {config.backend}"
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


def report(setup: Setup, folder: Path) -> None:
    """Prints the returns of the run: untrained, before adaptation, after each of its steps.

    Raises:
        ConfigError: metrics.jsonl is not that of the run.
    """
    config, rows = setup.config, tracking.read(folder)
    first, last = rows[: config.seeds], rows[-config.seeds :]
    if [row["seed"] for row in first] != list(run.seeds(config)):
        raise ConfigError(
            f"{folder / tracking.METRICS} has no rows of seeds {config.seed} to"
            f" {run.seeds(config)[-1]}, although the run is at its end; valid: the file it wrote"
        )

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
    terminal.warn_if_reuse_is_off([row.get("adapt/beta_zero_share") for row in last])
    training, evaluation, failed = (
        sum(row[name] for row in among)
        for name, among in zip(TROUBLES, (rows, last, last), strict=True)
    )
    of_tasks = [row["tasks/failed"] for row in last]
    terminal.warn_of_troubles(training, evaluation, failed, of_tasks, names, setup.env)


def mean_and_spread(values: list[float]) -> str:
    """Returns `12.3`, or `12.3 ± 4.5` for the values of several seeds."""
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"
