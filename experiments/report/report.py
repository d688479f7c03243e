"""Writes report.html: a run on one page."""

import html
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import run, terminal
from experiments.config import RunConfig, RunFailed
from experiments.report import maps, page, panels, source
from experiments.report.source import Source
from experiments.terminal import console
from jmql.settings import ConfigError

_LOG_LINES = 40


def make(folder: Path, play: bool) -> None:
    """Writes the report of a run and says where it is.

    Args:
        folder: the run directory.
        play: plays held-out tasks first, unless the newest checkpoint has been played.

    Raises:
        ConfigError: the folder is not a run directory.
        RunFailed: the disk refuses.
    """
    config = run.read_config(folder)
    with run.checkpoints(folder, config, read_only=True) as files:
        newest = max(files.steps(), default=None)
    if play and newest is not None and newest != _played(folder):
        from experiments.report import episodes

        try:
            with console.status("playing held-out tasks"):
                episodes.record(folder)
        except (ConfigError, RunFailed) as error:  # the rest can be shown
            console.print(f"no held-out task is played: {error}", soft_wrap=True)
    console.print(f"report: {write(folder)}", soft_wrap=True)


def _played(folder: Path) -> int | None:
    try:
        with np.load(folder / source.EPISODES) as file:
            return int(file["env_steps"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(folder: Path) -> Path:
    """Writes the report of a run directory, of what there is so far, and returns its path.

    Raises:
        ConfigError: the folder is not a run directory.
        RunFailed: the disk refuses.
    """
    it = source.read(folder)
    config, record = it.config, it.record
    subtitle = (
        f"{config.algorithm} · {config.profile} · backend {config.backend}"
        f" · seeds {', '.join(map(str, record['seeds']))}"
        f" · {record['platform']} {record['device']} x{record['device_count']} · JAX"
        f" {record['versions']['jax']} · {it.state}"
    )
    path = folder / run.REPORT
    page.write(path, f"{config.task}: {folder.name}", subtitle, _parts(it))
    return path


class _Words(NamedTuple):
    """What the page says of the stages of an evaluation."""

    what: str
    stages: str
    last: str
    episodes: str

    @property
    def gain(self) -> str:
        """How to read what is gained from the first to the last."""
        return (
            f" The gain is on the same tasks of the same seeds: {self.what} is shown to help where"
            " its whole band is above zero."
            if self.what
            else ""
        )


_ADAPTS = _Words(
    "adaptation",
    ", before adaptation and after it",
    " after adaptation",
    "The same start before and after adaptation.",
)
_TRIAL = _Words(
    "a trial's memory",
    " in each episode of a trial, over which the context lasts",
    " in the last episode of a trial",
    "The first and the last episode of a trial.",
)
_PLAIN = _Words("", "", "", "One episode of each task.")


def _words(config: RunConfig) -> _Words:
    if config.algorithm == "mql":
        return _ADAPTS
    return _TRIAL if config.context_span == "trial" else _PLAIN


def _parts(it: Source) -> list[str]:
    said = _words(it.config)
    lacking = "" if it.steps else "<p>There is no evaluation yet: nothing can be shown of it.</p>"
    played = it.episodes.get("env_steps")
    episode = (
        f" Of seed {it.config.seed}, after {int(played):,} steps." if played is not None else ""
    )
    return [
        _warnings(it),
        lacking,
        page.section(
            "Returns",
            "Mean over seeds and held-out tasks; the worst fifth is the mean of the lowest"
            f" fifth of the tasks{said.last}.",
            drawn(_returns, it),
        ),
        page.section(
            "Learning curves",
            f"Mean return on held-out tasks{said.stages}, with a 95 % bootstrap interval over seeds"
            " and tasks; minutes are of training and evaluation, without compilation."
            f"{said.gain} With one seed, bands are over tasks alone.",
            drawn(panels.learning, it, "Return on held-out tasks over training"),
            drawn(panels.gain, it, f"What {said.what} adds"),
        ),
        page.section(
            "By task",
            "Each held-out task by its own parameter, means over seeds; where seeds are several and"
            " the parameter is a number, bars go from the lowest seed to the highest.",
            drawn(_final_tasks, it),
            drawn(_study_tasks, it),
        ),
        page.section(
            "Adaptation by shots",
            "Interquartile mean over seeds and tasks with its 95 % interval, by episodes of new"
            " data; with ablations, each way to adapt learns from the same data. From nothing is"
            " hidden at first, for its scale would hide the others: click on its name.",
            drawn(panels.shots, it, "Return by shots of new data"),
        ),
        page.section(
            "Propensity",
            "How much of the past looks like a new task. An effective sample size near 1 says"
            " that all of replay counts alike, near 0 that little of it does; a classifier "
            "near 0.5 cannot tell new from old; one whose calibration error is large should "
            "not be believed.",
            drawn(panels.propensity, it, "Means over held-out tasks, over training"),
            drawn(maps.reuse, it, "Which training tasks are reused for which new ones"),
        ),
        page.section(
            "Context",
            "What the GRU says of the task from step to step, in its first two "
            "principal components; the large mark is the first step. Paths that part say that"
            f" tasks are told apart.{episode}",
            drawn(maps.context, it, "Context over an episode"),
        ),
        page.section(
            "What the policy does",
            f"{said.episodes}{episode}",
            drawn(maps.paths, it, "Where the body goes"),
            drawn(_replay, it),
        ),
        page.section(
            "Training",
            "Losses that grow without end, or values far above what an episode can earn, are "
            "the signs of a run that diverges.",
            drawn(panels.health, it, "Training, means over seeds"),
        ),
        page.section(
            "Settings", "What differs from the profile, and how to train it.", drawn(_settings, it)
        ),
        page.section(
            "Cost",
            "What it took; of runs side by side in one process, what all of them took together.",
            drawn(_cost, it),
        ),
        page.section("Log", f"The last lines of {source.LOG}.", _log(it)),
    ]


def drawn(make: Callable[[Source], object], it: Source, title: str = "") -> str:
    """Returns a part of the page, or that it cannot be drawn: the others are worth having."""
    try:
        found = make(it)
        return found if isinstance(found, str) else page.chart(found, title)
    except Exception as error:
        name = title or make.__name__.strip("_").replace("_", " ")
        logging.getLogger("jmql").exception("%s cannot be drawn", name)
        said = html.escape(f"{name} cannot be drawn: {type(error).__name__}: {error}")
        return f'<p class="warning">{said}</p>'


def _final_tasks(it: Source) -> str:
    figure = maps.by_task(it, maps.final_tasks(it))
    return page.chart(figure, "Held-out tasks of the run, at its last evaluation")


def _study_tasks(it: Source) -> str:
    found = maps.study_tasks(it)
    if found is None:
        return ""
    row = panels.as_set(it)[0]
    ranges = f", {row['ranges']}" if row.get("ranges") else ""
    count = next(iter(found[1].values())).shape[1]
    title = f"{count} fresh tasks (make evaluate) after {row['env_steps']:,} steps"
    return page.chart(maps.by_task(it, found), f"{title}{ranges}")


def _replay(it: Source) -> str:
    return page.replay(it.episodes)


def _warnings(it: Source) -> str:
    troubles = [f"{text}." for text in it.problems]
    failed = it.folder / run.FAILED
    if failed.exists():
        troubles.append(f"The run has failed: {failed.read_text(encoding='utf-8').strip()}")
    counts = [sum(row.get(name, 0) for row in it.rows) for name in terminal.TROUBLES]
    if any(counts):
        troubles.append(f"{terminal.troubles(*counts)}.")
    steps = it.steps
    zeros = it.values("adapt/beta_zero_share", steps[-1]) if steps else None
    if zeros is not None and zeros.mean() > 0.95:
        troubles.append(
            "Nearly all weights of replay are zero: nothing is reused (propensity.zero_below,"
            " propensity.inverse_regularization)."
        )
    return "".join(f'<p class="warning">{html.escape(text)}</p>' for text in troubles)


def _returns(it: Source) -> str:
    """Untrained, at the best evaluation and at the last, of each stage."""
    if not it.steps:
        return ""
    last = panels.stages(it)[-1]
    best = max(it.steps, key=lambda steps: _mean(it, last, steps))
    rows = []
    for label, steps in {"untrained": it.steps[0], "best": best, "last": it.steps[-1]}.items():
        numbers = [_mean(it, stage, steps) for stage in panels.stages(it)]
        numbers.append(_mean(it, f"{it.last}_p20", steps))
        rows.append([label, steps, *(page.shown(x) if np.isfinite(x) else "-" for x in numbers)])
    names = [terminal.called(it.config, stage) for stage in panels.stages(it)]
    return page.table(["", "environment steps", *names, "worst fifth"], rows)


def _mean(it: Source, stage: str, steps: int) -> float:
    values = it.values(f"eval/{stage}", steps)
    return -np.inf if values is None else float(values.mean())


def _settings(it: Source) -> str:
    differing = page.table(
        ["setting", "value", "profile"], [(name, str(x), str(y)) for name, x, y in it.changed]
    )
    versions = {"git commit": it.record["git_commit"]} | it.record["versions"]
    versions |= {"matrix products": it.record["matmul_precision"], "group": it.record["group"]}
    return (
        (differing or "<p>As the profile.</p>")
        + f"<pre>{html.escape(it.command)}</pre>"
        + page.table(["what", "version"], [(name, str(x)) for name, x in versions.items()])
    )


def _cost(it: Source) -> str:
    if not it.rows:
        return ""
    if not it.seconds:
        return ""
    (steps, seconds), last = list(it.seconds.items())[-1], it.rows[-1]
    speeds = [row["time/env_steps_per_second"] for row in it.rows]
    hours = (seconds + last["time/compile_seconds"]) * it.record["device_count"] / 3600
    return page.table(
        ["what", "how much"],
        [
            ("environment steps of each seed", f"{steps:,}"),
            ("updates of each seed", f"{last.get('updates', 0):,}"),
            ("time of cycles, with evaluation", terminal.human_time(seconds)),
            ("compilation", f"{last['time/compile_seconds']:.0f} s"),
            ("environment steps a second, median", f"{np.median(speeds):,.0f}"),
            (f"device hours ({it.record['device']})", f"{hours:.3f}"),
        ],
    )


def _log(it: Source) -> str:
    lines = "\n".join(it.log[-_LOG_LINES:])
    return f"<pre>{html.escape(lines)}</pre>" if lines else ""
