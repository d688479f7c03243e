"""Trains runs, from the start or from where they stopped, and says what came of them."""

import contextlib
import importlib.util
import logging
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import guard, hosts, loop, memory, population, run, terminal, tracking
from experiments.checkpoint import Checkpoints
from experiments.config import RunConfig, RunFailed
from experiments.loop import Member
from experiments.places import Place, beginning, begun, groups, on_tasks_of_first, opened, rows_of
from experiments.program import Program
from experiments.stop import SAVED, Stop
from experiments.terminal import console
from experiments.tracking import Tracker
from jmql.settings import ConfigError
from jmql.train import TrainState


def train(runs: Sequence[RunConfig], stop: Stop) -> int:
    """Meta-trains, adapts and evaluates, from the start or from where runs stopped.

    Args:
        runs: one, or several side by side (`experiments.population`).
        stop: entered.

    Returns:
        The exit code: 0, or `stop.SAVED` after a signal.

    Raises:
        ConfigError: a configuration cannot work; nothing has been written.
        RunFailed: anything else that ends a run early.
    """
    if hosts.count() > 1 and len(runs) > 1:
        raise ConfigError("distributed is True for several runs; valid: one with several seeds")
    if len(runs) > 1 and not all(one.run_id or one.resume for one in runs):
        raise ConfigError(
            "a --member has no --run-id; it must have one, by which the same command goes on"
        )
    if not hosts.is_first():
        return follow(runs, stop)
    program, found = opened(runs)
    folders = [folder for _, folder, _ in found]
    lone = shlex.quote(str(folders[0])) if len(runs) == 1 else ""
    if runs[0].distributed:
        stop.again = "the same command on every host"
    elif lone:
        stop.again = f"make train RESUME={lone}"
    failed: dict[Path, RunFailed] = {}
    refused: list[str] = []  # by mirrors
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(guard.locked(folder))
        stack.callback(lambda: refused.extend(mirror.finish() for *_, mirror in found))
        stack.enter_context(guard.logged(*folders))
        stack.enter_context(hosts.together())
        places = [
            Place(alone, folder, stack.enter_context(run.checkpoints(folder, alone.config)), mirror)
            for alone, folder, mirror in found
        ]
        steps, whole = train_all(program, places, stop, failed)
        if lone and failed:
            raise failed[folders[0]]
        ended = [place for place in places if steps == whole and place.folder not in failed]
        rows = {place.folder: rows_of(place.program, place.folder, whole) for place in ended}
        if rows:
            terminal.report(program, rows)
    for folder, why in failed.items():
        console.print(f"{folder.name} failed: {why}", soft_wrap=True)
    where = f"run: {folders[0]}" if lone else f"{len(runs)} runs in {folders[0].parent}"
    pages = [folder / run.REPORT for folder in folders if (folder / run.REPORT).exists()]
    where += f" · report: {pages[0]}" if pages and lone and steps == whole else ""
    again = f"make evaluate RUN={lone or folders[0].parent / 'NAME'}"
    if steps < whole:
        console.print(f"stopped by {stop.signal} and saved at {steps:,} of {whole:,} steps")
        again = stop.again
    refused = list(filter(None, refused))
    for text in refused:
        console.print(text, soft_wrap=True)
    console.print(f"{where} · next: {again}", soft_wrap=True)
    if steps < whole:
        return SAVED
    if failed:
        raise RunFailed(f"failed: {', '.join(folder.name for folder in failed)}")
    if refused:
        raise RunFailed("; ".join(refused))
    return 0


def train_all(
    program: Program, places: Sequence[Place], stop: Stop, failed: dict[Path, RunFailed]
) -> tuple[int, int]:
    """Trains runs, those side by side that go on from the same step, one group after the other.

    Args:
        program: of all of them.
        places: of the runs.
        stop: entered.
        failed: takes why a run is not trained to its end.

    Returns:
        The steps of the last group that was trained, and of the whole of a run.
    """
    for place in places:
        place.steps = place.checkpoints.steps()
        if not place.steps and any(row["updates"] for row in tracking.read(place.folder)):
            raise RunFailed(
                f"{place.folder} has results but no checkpoint; nothing has been changed"
            )
    per_round, total = program.config.steps_per_round, program.config.total_rounds
    done, waiting = total, groups(program, places)
    while waiting and done == total:
        start, group = waiting.pop(0)
        one = program
        if len(group) < len(places):
            alone = [place.program for place in group]
            one = population.on_tasks_of(population.build([x.config for x in alone]), alone)
        state = begun(one, group, start)
        if state is None:  # a checkpoint is damaged
            waiting = groups(one, group) + waiting
            continue
        done = int(hosts.local(state.rounds))
        if done < total or len(group) == len(places):
            terminal.header(one, [place.folder for place in group], done * per_round)
        if done < total:
            done = go_on(one, state, group, stop, failed)
    return done * per_round, total * per_round


class Nowhere:
    """Takes the rows of a run that another host writes down."""

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Takes the metrics of one cycle."""

    def warn(self, text: str) -> None:
        """Takes a line."""


def follow(runs: Sequence[RunConfig], stop: Stop) -> int:
    """Trains as `train` does on a host that is not the first: it writes and prints nothing."""
    console.quiet = True
    program = on_tasks_of_first(population.build(runs))
    state = beginning(program)
    done, total = int(hosts.local(state.rounds)), program.config.total_rounds
    if done < total:
        cycle, compile_seconds = stop.wait(compiled, program)
        members, stop.ready = [Member(program.config, Nowhere())], True
        save = saver(program, [], members)
        done = loop.loop(program, cycle, state, members, save, stop, compile_seconds)
        if members[0].failed:
            raise RunFailed(str(members[0].failed))
    return 0 if done == total else SAVED


def go_on(
    program: Program,
    state: TrainState,
    places: Sequence[Place],
    stop: Stop,
    failed: dict[Path, RunFailed],
) -> int:
    """Trains from a state to the end or to a signal; returns the rounds reached.

    Args:
        program: what is trained.
        state: leaves [S, ...]; donated.
        places: its runs.
        stop: entered.
        failed: takes why a run is not trained to its end, by its directory.
    """
    started, config = time.monotonic(), program.config
    refuse_endless_refill(program, state)
    records = [run.write_record(place.folder, place.program.config) for place in places]
    cycle, compile_seconds = stop.wait(compiled, program)
    saving = memory.size(run.saved(config, program.shapes)) if jax.default_backend() == "cpu" else 0
    try:
        memory.refuse_too_much(
            f"beside its state, a cycle of this run ({memory.SETTINGS}, tasks.held_out and seeds"
            " make it)",
            memory.in_one(memory.of_program(cycle), program.mesh) + saving,
        )
    except ConfigError:
        for place in places:
            if not place.checkpoints.steps():  # the lock is ours, and nothing has been learned here
                run.remove(place.folder)
        raise
    steps = int(hosts.local(state.rounds)) * config.steps_per_round
    for place in places:
        (place.folder / run.FAILED).unlink(missing_ok=True)
    stop.saved = False
    with contextlib.ExitStack() as stack:
        trackers = [
            stack.enter_context(Tracker(place.folder, place.program.config, record, steps))
            for place, record in zip(places, records, strict=True)
        ]
        members = [Member(x.program.config, y) for x, y in zip(places, trackers, strict=True)]
        save = saver(program, places, members)
        stop.ready = True
        done = loop.loop(program, cycle, state, members, save, stop, compile_seconds)
        for place, member, tracker in zip(places, members, trackers, strict=True):
            if member.failed:
                why = RunFailed(
                    f"{member.failed}; the last good checkpoint is {last_good(place.checkpoints)},"
                    f" every setting is in {place.folder / 'config.json'}"
                )
                why.__cause__ = member.failed
                failed[place.folder], tracker.exit_code = why, 1
                (place.folder / run.FAILED).write_text(f"{why}\n", encoding="utf-8")
        stop.saved = not config.mirror  # else it is to be copied
        for place, member, tracker in zip(places, members, trackers, strict=True):
            if done < config.total_rounds and not member.failed:
                tracker.exit_code = SAVED  # after notice there may be no time for a page
                continue
            if not member.failed:
                rows = tracking.read(place.folder)[-member.config.seeds :]
                tracker.tasks(["task", *program.stages], per_task(program, rows))
            page = report_of(place.folder)
            if page:
                tracker.page(page)
        if all(member.failed for member in members):
            done = config.total_rounds  # there is nothing to go on with
    urls = [url for tracker in trackers for url in tracker.urls]
    console.print(
        f"trained for {terminal.human_time(time.monotonic() - started)};"
        f" W&B: {', '.join(urls) or trackers[0].wandb}",
        soft_wrap=True,
    )
    return done


def report_of(folder: Path) -> Path | None:
    """Writes the page of a run, where the extra `report` is installed; None where there is none."""
    if importlib.util.find_spec("plotly") is None:
        return None
    try:
        from experiments.report import report

        return report.write(folder)
    except Exception:  # a page is not worth a run
        logging.getLogger("jmql").exception("no report could be written", extra={"folder": folder})
        return None


def refuse_endless_refill(program: Program, state: TrainState) -> None:
    """Raises ConfigError if a replay that was not saved takes all that is left of a run to fill."""
    config = program.config
    left = config.total_rounds - int(hosts.local(state.rounds))
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


def saver(program: Program, places: Sequence[Place], members: Sequence[Member]) -> loop.Save:
    """Returns a function of (state, steps, now) that saves by the clock, or at once, those runs
    that have not failed. Hosts other than the first, without places, only give their part.

    Raises:
        RunFailed: a save failed; the message says what is needed and what there is.
    """
    last = time.monotonic()

    def save(state: TrainState, steps: int, now: bool) -> None:
        nonlocal last
        due = now or time.monotonic() - last >= 60 * program.config.checkpoint.minutes
        due = hosts.agree(due)
        last = time.monotonic() if due else last
        kept = run.saved(program.config, state)
        kept = hosts.gathered(kept) if due else kept
        alive = [i for i in range(len(places)) if not members[i].failed]
        for i in alive:
            with explained(places[i], steps):
                places[i].checkpoints.check()
                if due:
                    places[i].checkpoints.save(steps, population.part(program, kept, i))
                    places[i].mirror.push(places[i].checkpoints.saving)
        for i in alive if now else ():
            with explained(places[i], steps):
                places[i].checkpoints.wait()

    return save


@contextlib.contextmanager
def explained(place: Place, steps: int) -> Iterator[None]:
    """Makes whatever a save raises a RunFailed."""
    try:
        yield
    except Exception as error:  # orbax passes on what the file system and tensorstore raise
        free = memory.human_bytes(shutil.disk_usage(place.folder).free)
        need = memory.human_bytes(
            memory.size(run.saved(place.program.config, place.program.shapes))
        )
        reason = str(error).strip().partition("\n")[0]
        raise RunFailed(
            f"the state at {steps:,} steps could not be saved: {reason} (up to {need} are"
            f" needed, {free} are free); the last good checkpoint is"
            f" {last_good(place.checkpoints)}, from which make train"
            f" RESUME={shlex.quote(str(place.folder))} goes on"
        ) from error


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
