"""The host loop: run a cycle, fetch its metrics once, write them down, save now and then."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import terminal
from experiments.config import RunConfig, all_seeds
from experiments.program import Program
from experiments.stop import Stop
from experiments.tracking import Tracker, to_rows
from jmql.train import TrainState

log = logging.getLogger("jmql")

Save = Callable[[TrainState, int, bool], None]
Cycle = Callable[..., Any]  # `Program.cycle`, compiled
Results = dict[str, np.ndarray]  # of one cycle, [S] or, of single tasks, [S, K]


def loop(
    program: Program,
    cycle: Cycle,
    state: TrainState,
    tracker: Tracker,
    save: Save,
    stop: Stop,
    compile_seconds: float,
) -> int:
    """Runs cycles until the configured number of steps or a signal.

    Args:
        program: what is trained.
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
    config = program.config
    per_round, updates = config.steps_per_round, config.train.updates_per_round
    total, done = config.total_rounds, int(state.rounds[0])
    filling = to_fill(config, state)
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
            metrics["env_steps"] = metrics.pop("rounds").astype(np.int64) * per_round
            speed = {
                "time/env_steps_per_second": config.seeds * rounds * per_round / seconds,
                "time/updates_per_second": config.seeds * (not fill) * rounds * updates / seconds,
                "time/compile_seconds": compile_seconds,
            }
            metrics |= {name: np.full(config.seeds, value) for name, value in speed.items()}
            metrics |= {f"tasks/{stage}": of_tasks[stage] for stage in program.stages}
            metrics["tasks/failed"] = of_tasks["failed"].astype(int)
            refuse_nonfinite(metrics, config)
            log_failures(program, metrics)
            missing = ["train/"] if fill else []  # nothing has been learned yet
            missing += [] if measured else ["eval/", "adapt/", "tasks/"]
            metrics = {k: v for k, v in metrics.items() if not k.startswith(tuple(missing))}
            if fill:
                begun, first = time.monotonic(), done
            tracker.log(to_rows(metrics))
            stopping = bool(stop.signal)  # read once: what comes later stops the next cycle
            save(state, done * per_round, (fill and measured) or done == total or stopping)
            if measured:
                bar.update(
                    done * per_round,
                    metrics[f"eval/{program.stages[0]}"].mean(),
                    metrics[f"eval/{program.stages[-1]}"].mean(),
                    speed["time/updates_per_second"],
                    None if fill else (time.monotonic() - begun) * (total - done) / (done - first),
                    terminal.troubles(*(metrics[name].sum() for name in terminal.TROUBLES)),
                )
            else:
                bar.advance(done * per_round)
    return done


def to_fill(config: RunConfig, state: TrainState) -> int:
    """Returns the rounds of random actions to come, by what the replay holds."""
    return config.warmup_rounds - int(state.memory.size[0]) // config.collect.unroll


def fetched(
    cycle: Cycle, state: TrainState, rounds: int, fill: bool, measured: bool
) -> tuple[TrainState, Results, Results]:
    """Runs one cycle; returns its state, on device, and its results, fetched at once."""
    state, *results = cycle(state, jnp.int32(rounds), jnp.asarray(fill), jnp.asarray(measured))
    metrics, of_tasks = jax.device_get(results)
    return state, metrics, of_tasks


def refuse_nonfinite(metrics: Results, config: RunConfig) -> None:
    """Raises FloatingPointError that names the first `train/*` [S] that is not a finite number.

    What is measured may be missing: no episode ended, or no adaptation came to an end.
    """
    for name in sorted(name for name in metrics if name.startswith("train/")):
        bad = ~np.isfinite(metrics[name])
        if bad.any():
            raise FloatingPointError(
                f"{name} of seed {all_seeds(config)[int(bad.argmax())]} is not finite after the"
                f" cycle that ended at {int(metrics['env_steps'][0]):,} steps, which is not logged"
                f" (td3.learning_rate {config.td3.learning_rate:g})"
            )


def log_failures(program: Program, metrics: Results) -> None:
    """Says in log.txt on which tasks adaptation failed."""
    names = terminal.task_names(program.env, program.held_out)
    for seed, failed in zip(all_seeds(program.config), metrics["tasks/failed"], strict=True):
        if failed.any():
            where = ", ".join(names[k] for k in np.flatnonzero(failed))
            steps = int(metrics["env_steps"][0])
            log.warning("seed %d, %d steps: adaptation failed on %s", seed, steps, where)
