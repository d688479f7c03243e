"""The host loop: run a cycle, fetch its metrics once, write them down, save now and then."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import hosts, terminal
from experiments.config import RunConfig, all_seeds
from experiments.program import Program
from experiments.stop import Stop
from experiments.tracking import to_rows
from jmql.settings import flatten
from jmql.train import TrainState
from jmql.types import Array

Save = Callable[[TrainState, int, bool], None]
Cycle = Callable[..., Any]  # `Program.cycle`, compiled
Results = dict[str, np.ndarray]  # of one cycle, [S] or, of single tasks, [S, K]


class Record(Protocol):
    """Takes what a run was; `tracking.Tracker` does."""

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Takes the metrics of one cycle, a row a seed."""

    def warn(self, text: str) -> None:
        """Takes a line for log.txt."""


@dataclasses.dataclass
class Member:
    """A run that is trained, alone or side by side with others."""

    config: RunConfig
    record: Record
    failed: FloatingPointError | None = None  # why it is trained no more


def loop(
    program: Program,
    cycle: Cycle,
    state: TrainState,
    members: Sequence[Member],
    save: Save,
    stop: Stop,
    compile_seconds: float,
) -> int:
    """Runs cycles until the configured number of steps or a signal, or until all runs failed.

    Args:
        program: what is trained.
        cycle: compiled; takes what `Program.cycle` takes.
        state: leaves [S, ...]; donated.
        members: its runs. One of which a metric is not a finite number has failed, and the others
            go on.
        save: called after every cycle, once its rows are written, with the state, its steps, and
            whether it must be saved now.
        stop: looked at after every cycle.
        compile_seconds: for the metrics.

    Returns:
        Rounds of the last state, which has been saved.

    Raises:
        RunFailed: the state could not be saved.
    """
    config, own = program.config, members[0].config.seeds
    per_round, updates = config.steps_per_round, config.updates_per_round
    total, done = config.total_rounds, int(hosts.local(state.rounds))
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
            state, metrics, of_tasks = stop.wait(
                fetched, cycle, state, rounds, fill, measured, program.numbers
            )
            seconds = time.monotonic() - before
            done += rounds
            metrics["env_steps"] = metrics.pop("rounds").astype(np.int64) * per_round
            speed = {
                "time/env_steps_per_second": own * rounds * per_round / seconds,
                "time/updates_per_second": own * (not fill) * rounds * updates / seconds,
                "time/compile_seconds": compile_seconds,
            }
            metrics |= {name: np.full(config.seeds, value) for name, value in speed.items()}
            metrics |= {f"tasks/{stage}": of_tasks[stage] for stage in program.stages}
            metrics["tasks/failed"] = of_tasks["failed"].astype(int)
            missing = ["train/"] if fill else []  # nothing has been learned yet
            missing += [] if measured else ["eval/", "adapt/", "tasks/"]
            for i, member in enumerate(members):
                mine = {name: x[i * own : (i + 1) * own] for name, x in metrics.items()}
                take(program, member, mine, missing)
            if fill:
                begun, first = time.monotonic(), done
            if all(member.failed for member in members):
                break
            # Read once: what comes later stops the next cycle.
            stopping = hosts.agree(bool(stop.signal))
            save(state, done * per_round, (fill and measured) or done == total or stopping)
            if measured:
                slots = np.repeat([not member.failed for member in members], own)
                bar.update(
                    done * per_round,
                    [metrics[f"eval/{stage}"][slots].mean() for stage in program.ends],
                    len(members) * speed["time/updates_per_second"],
                    None if fill else (time.monotonic() - begun) * (total - done) / (done - first),
                    terminal.troubles(*(metrics[name][slots].sum() for name in terminal.TROUBLES)),
                )
            else:
                bar.advance(done * per_round)
    return done


def take(program: Program, member: Member, metrics: Results, missing: Sequence[str]) -> None:
    """Writes down what a cycle was for one run, or that it has failed.

    Args:
        program: what is trained.
        member: the run; nothing happens where it has failed before.
        metrics: of its seeds.
        missing: how the names of metrics that are none begin.
    """
    member.failed = member.failed or nonfinite(metrics, member.config)
    if member.failed:
        return
    names = terminal.task_names(program.env, program.held_out)
    for seed, failed in zip(all_seeds(member.config), metrics["tasks/failed"], strict=True):
        if failed.any():
            where = ", ".join(names[k] for k in np.flatnonzero(failed))
            steps = int(metrics["env_steps"][0])
            member.record.warn(f"seed {seed}, {steps} steps: adaptation failed on {where}")
    told = {name: x for name, x in metrics.items() if not name.startswith(tuple(missing))}
    member.record.log(to_rows(told))


def to_fill(config: RunConfig, state: TrainState) -> int:
    """Returns the rounds of random actions to come, by what the replay holds."""
    return config.warmup_rounds - int(hosts.local(state.memory.size)) // config.collect.unroll


def fetched(
    cycle: Cycle,
    state: TrainState,
    rounds: int,
    fill: bool,
    measured: bool,
    numbers: Mapping[str, Array],
) -> tuple[TrainState, Results, Results]:
    """Runs one cycle; returns its state, on device, and its results, fetched at once."""
    flags = jnp.asarray(fill), jnp.asarray(measured)
    state, *results = cycle(state, jnp.int32(rounds), *flags, numbers)
    metrics, of_tasks = jax.device_get(results)
    return state, metrics, of_tasks


def nonfinite(metrics: Results, config: RunConfig) -> FloatingPointError | None:
    """Returns an error that names the first `train/*` [S] that is not a finite number, if any.

    What is measured may be missing: no episode ended, or no adaptation came to an end.
    """
    setting = "td3.learning_rate" if config.algorithm == "mql" else "p3o.learning_rate"
    for name in sorted(name for name in metrics if name.startswith("train/")):
        bad = ~np.isfinite(metrics[name])
        if bad.any():
            return FloatingPointError(
                f"{name} of seed {all_seeds(config)[int(bad.argmax())]} is not finite after the"
                f" cycle that ended at {int(metrics['env_steps'][0]):,} steps, which is not logged"
                f" ({setting} {flatten(config)[setting]:g})"
            )
    return None
