"""Writes report.html: a run on one page."""

import html
from pathlib import Path

import numpy as np

from experiments import run, terminal
from experiments.report import page, panels, source
from experiments.report.source import Source
from experiments.terminal import console

_LOG_LINES = 40


def make(folder: Path, play: bool) -> None:
    """Writes the report of a run and says where it is.

    Args:
        folder: the run directory.
        play: plays held-out tasks first, unless the newest checkpoint has been played.

    Raises:
        ConfigError: the folder is not a run directory.
        RunFailed: the disk refuses, or no checkpoint can be read.
    """
    config = run.read_config(folder)
    with run.checkpoints(folder, config, read_only=True) as files:
        newest = max(files.steps(), default=None)
    if play and newest is not None and newest != _played(folder):
        from experiments.report import episodes

        with console.status("playing held-out tasks"):
            episodes.record(folder)
    console.print(f"report: {write(folder)}", soft_wrap=True)


def _played(folder: Path) -> int | None:
    steps = source.read(folder).episodes.get("env_steps")
    return None if steps is None else int(steps)


def write(folder: Path) -> Path:
    """Writes the report of a run directory, of what there is so far, and returns its path.

    Raises:
        ConfigError: the folder is not a run directory.
        RunFailed: the disk refuses.
    """
    it = source.read(folder)
    config, record = it.config, it.record
    subtitle = (
        f"{config.profile} · backend {config.backend}"
        f" · seeds {', '.join(map(str, record['seeds']))}"
        f" · {record['platform']} {record['device']} x{record['device_count']} · JAX"
        f" {record['versions']['jax']} · {it.state}"
    )
    path = folder / run.REPORT
    page.write(path, f"{config.task}: {folder.name}", subtitle, _parts(it))
    return path


def _parts(it: Source) -> list[str]:
    lacking = "" if it.steps else "<p>There is no evaluation yet: nothing can be shown of it.</p>"
    played = it.episodes.get("env_steps")
    episode = (
        f" Of seed {it.config.seed}, after {int(played):,} steps." if played is not None else ""
    )
    study = panels.study_tasks(it)
    fresh = "" if study is None else f"{study[1].shape[1]} fresh tasks (make evaluate)"
    return [
        _warnings(it),
        lacking,
        page.section(
            "Returns",
            "Mean over seeds and held-out tasks; the worst fifth is the mean of the lowest "
            "fifth of the tasks after adaptation.",
            _returns(it),
        ),
        page.section(
            "Learning curves",
            "Mean return on held-out tasks, before adaptation and after it, with a 95 % "
            "bootstrap interval over seeds and tasks; minutes with compilation. Where the "
            "bands of before and after overlap all along, adaptation is not shown to help.",
            page.chart(panels.learning(it), "Return on held-out tasks over training"),
        ),
        page.section(
            "By task",
            "Each held-out task by its own parameter: means over seeds, bars from the lowest "
            "seed to the highest.",
            page.chart(panels.by_task(it, panels.final_tasks(it)), "Held-out tasks of the run"),
            page.chart(panels.by_task(it, study), fresh),
        ),
        page.section(
            "Adaptation by shots",
            "Interquartile mean over seeds and tasks with its 95 % interval, by episodes of new"
            " data; with ablations, each way to adapt learns from the same data. From nothing is"
            " hidden at first, for its scale would hide the others: click on its name.",
            page.chart(panels.shots(it), "Return by shots of new data"),
        ),
        page.section(
            "Propensity",
            "How much of the past looks like a new task. An effective sample size near 1 says"
            " that all of replay counts alike, near 0 that little of it does; a classifier "
            "near 0.5 cannot tell new from old; one whose calibration error is large should "
            "not be believed.",
            page.chart(panels.propensity(it), "Means over held-out tasks, over training"),
            page.chart(panels.reuse(it), "Which training tasks are reused for which new ones"),
        ),
        page.section(
            "Context",
            "What the actor's GRU says of the task from step to step, in its first two "
            "principal components; the large mark is the first step. Paths that part say that"
            f" tasks are told apart.{episode}",
            page.chart(panels.context(it), "Context over an episode"),
        ),
        page.section(
            "What the policy does",
            f"The same start before and after adaptation.{episode}",
            page.chart(panels.paths(it), "Paths seen from above"),
            page.replay(it.episodes),
        ),
        page.section(
            "Training",
            "Losses that grow without end, or values far above what an episode can earn, are "
            "the signs of a run that diverges.",
            page.chart(panels.health(it), "Training, means over seeds"),
        ),
        page.section(
            "Settings", "What differs from the profile, and how to train it.", _settings(it)
        ),
        page.section("Cost", "What it took, evaluation included.", _cost(it)),
        page.section("Log", f"The last lines of {source.LOG}.", _log(it)),
    ]


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
    best = max(it.steps, key=lambda steps: _mean(it, "return_post", steps))
    rows = []
    for label, steps in {"untrained": it.steps[0], "best": best, "last": it.steps[-1]}.items():
        numbers = [_mean(it, stage, steps) for stage in panels.stages(it)]
        rows.append([label, steps, *numbers, _mean(it, "return_post_p20", steps)])
    names = [panels.stage_name(stage) for stage in panels.stages(it)]
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
    (steps, seconds), last = list(it.seconds.items())[-1], it.rows[-1]
    speeds = [row["time/env_steps_per_second"] for row in it.rows]
    hours = seconds * it.record["device_count"] / 3600
    return page.table(
        ["what", "how much"],
        [
            ("environment steps of each seed", f"{steps:,}"),
            ("updates of each seed", f"{last.get('updates', 0):,}"),
            ("time, compilation included", terminal.human_time(seconds)),
            ("compilation", f"{last['time/compile_seconds']:.0f} s"),
            ("environment steps a second, median", f"{np.median(speeds):,.0f}"),
            (f"device hours ({it.record['device']})", f"{hours:.3f}"),
        ],
    )


def _log(it: Source) -> str:
    lines = "\n".join(it.log[-_LOG_LINES:])
    return f"<pre>{html.escape(lines)}</pre>" if lines else ""
