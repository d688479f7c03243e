"""The host loop: run a cycle, fetch its metrics once, write them down, save at the end."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run, terminal
from experiments.presets import RunConfig
from experiments.run import Setup
from experiments.terminal import STAGES, console
from experiments.tracking import Tracker, to_rows
from jmql import checkpoint

Results = dict[str, np.ndarray]  # metrics [S], and of single tasks [S, K]


def train(config: RunConfig) -> Path:
    """Meta-trains, adapts and evaluates; returns the run directory.

    Raises:
        ConfigError: the configuration cannot work; nothing has been written.
    """
    setup = run.setup(config)
    folder, record = run.create(setup)
    with run.logged(folder):
        header(setup, folder)
        started = time.monotonic()
        cycle, state = compiled(setup)
        compile_seconds = time.monotonic() - started
        console.print(f"compiled in {compile_seconds:.0f} s")
        with Tracker(folder, config, record) as tracker:
            state, first, last = loop(setup, cycle, state, tracker, compile_seconds)
            tracker.tasks(["task", *STAGES], per_task(setup, last))
        with console.status("saving"):
            checkpoint.save(folder / "checkpoints", int(last["env_steps"][0]), state)
        report(setup, first, last)
        console.print(
            f"finished in {terminal.human_time(time.monotonic() - started)};"
            f" W&B: {', '.join(tracker.urls) or tracker.wandb}"
        )
    console.print(f"run: {folder} · next: make evaluate RUN={folder}", soft_wrap=True)
    return folder


def compiled(setup: Setup) -> tuple[Any, Any]:
    """Returns the compiled cycle and the first TrainState [S, ...].

    Compiled ahead of time, the cycle cannot be traced again: other shapes are an error.
    """
    shapes = jax.eval_shape(setup.init, setup.keys)
    with console.status("compiling the cycle (kept for the next run of these shapes)"):
        lowered = jax.jit(setup.cycle, donate_argnums=0).lower(
            shapes, jnp.int32(0), jnp.zeros((), bool)
        )
        cycle = lowered.compile()
        return cycle, jax.block_until_ready(jax.jit(setup.init)(setup.keys))


def per_task(setup: Setup, results: Results) -> list[list[list[Any]]]:
    """Returns for every seed a row for each held-out task: its name and returns."""
    names = terminal.task_names(setup.held_out)
    columns = [results[f"tasks/{stage}"] for stage in STAGES]  # [S, K] each
    return [
        [[name, *(float(x[seed][k]) for x in columns)] for k, name in enumerate(names)]
        for seed in range(setup.config.seeds)
    ]


def loop(
    setup: Setup, cycle: Any, state: Any, tracker: Tracker, compile_seconds: float
) -> tuple[Any, Results, Results]:
    """Runs cycles until the configured number of steps.

    Returns:
        The last state, and the results of the untrained agent and of the last cycle.
    """
    config = setup.config
    per_round, updates = config.steps_per_round, config.train.updates_per_round
    total = -(-config.train.env_steps // per_round)  # rounds, warm-up included
    warmup = min(total, -(-config.collect.warmup_steps // per_round))
    done, results, begun = 0, [], time.monotonic()
    with terminal.Bar(config.task, total * per_round) as bar:
        while done < total:
            fill = done == 0
            rounds = warmup if fill else min(config.train.rounds_per_cycle, total - done)
            before = time.monotonic()
            state, metrics, per_task = cycle(state, jnp.int32(rounds), jnp.asarray(fill))
            metrics, per_task = jax.device_get((metrics, per_task))  # the only fetch of a cycle
            seconds = time.monotonic() - before
            done += rounds
            speed = {
                "time/env_steps_per_second": config.seeds * rounds * per_round / seconds,
                "time/updates_per_second": config.seeds * (not fill) * rounds * updates / seconds,
                "time/compile_seconds": compile_seconds,
            }
            metrics |= {name: np.full(config.seeds, value) for name, value in speed.items()}
            metrics |= {f"tasks/{stage}": per_task[stage] for stage in STAGES}
            if fill:  # nothing has been learned yet
                metrics = {k: v for k, v in metrics.items() if not k.startswith("train/")}
                begun = time.monotonic()
            results.append(metrics)
            tracker.log(to_rows(metrics))
            bar.update(
                done * per_round,
                metrics["eval/return_pre"].mean(),
                metrics["eval/return_post"].mean(),
                speed["time/updates_per_second"],
                None if fill else (time.monotonic() - begun) * (total - done) / (done - warmup),
            )
    return state, results[0], results[-1]


def header(setup: Setup, folder: Path) -> None:
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
        f"writing to {folder}",
        soft_wrap=True,
    )


def report(setup: Setup, first: Results, last: Results) -> None:
    """Prints the returns of the run: untrained, before adaptation, after each of its steps."""

    def cells(values: list[np.ndarray]) -> list[str]:
        spread = len(values[0]) > 1
        return [f"{v.mean():.1f}" + (f" ± {v.std(ddof=1):.1f}" if spread else "") for v in values]

    def row(kind: str, pick: Any) -> list[str]:
        untrained = first[f"{kind}/return_pre"]
        return cells([pick(x) for x in (untrained, *(last[f"{kind}/{s}"] for s in STAGES))])

    rows = [("mean", row("eval", lambda x: x))]
    names = terminal.task_names(setup.held_out)
    for k, name in enumerate(names if len(names) <= 4 else []):
        rows.append((name, row("tasks", lambda x, k=k: x[:, k])))
    rows.append(("worst fifth", ["", "", "", *cells([last["eval/return_post_p20"]])]))
    config = setup.config
    terminal.table(
        f"return on {config.tasks.held_out} held-out tasks after {last['env_steps'][0]:,} steps"
        + (f", mean ± std over {config.seeds} seeds" if config.seeds > 1 else ""),
        ["untrained", *STAGES.values()],
        rows,
    )
    terminal.warn_if_reuse_is_off(float(last["adapt/beta_zero_share"].mean()))
