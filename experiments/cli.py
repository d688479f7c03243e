"""`jmql train|evaluate|report|compare|sweep|...`: wiring between the command line and the rest.

Exit codes: 0 done; 2 wrong usage, with one line that says what and what is valid; 33 stopped by a
signal and saved; 1 anything else, with the name of the file that has the traceback.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.config import RunConfig, RunFailed, Study
from experiments.stop import Stop
from experiments.view import View
from jmql.config import AdaptConfig, EvaluateConfig, PropensityConfig
from jmql.settings import ConfigError, Settings, count, flatten

# What takes long to import, JAX before all, is imported where it is used: a signal in the first
# seconds of a training must find it ready to answer.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs(Study):
    """Adapts a trained run to fresh held-out tasks and reports the returns. What it is measured
    with is as in the run, unless it is set here.
    """

    run: Path  # a run directory, runs/<task>/<run_id>
    devices: int = count(0, 0)  # that share the work; 0: all that help
    adapt: AdaptConfig = dataclasses.field(default_factory=AdaptConfig)
    propensity: PropensityConfig = dataclasses.field(default_factory=PropensityConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)


@dataclasses.dataclass(frozen=True)
class ExportArgs(Settings):
    """Writes a trained run as one file, with which `jmql.load` acts and adapts elsewhere."""

    run: Path  # a run directory, runs/<task>/<run_id>
    out: Path  # the file
    seed: int | None = None  # which of the run's; by default the first
    replay: int = count(20_000, 0)  # about so many transitions, for adaptation; 0: none


@dataclasses.dataclass(frozen=True)
class ReportArgs(Settings):
    """Writes report.html into a run directory, of what there is so far."""

    run: Path  # a run directory, runs/<task>/<run_id>
    episodes: bool = True  # play held-out tasks with the newest checkpoint, and show them


@dataclasses.dataclass(frozen=True)
class CompareArgs(Settings):
    """Compares runs, groups of seeds: a table here and one in a page, with curves."""

    runs: tuple[str, ...] = ()  # run directories, patterns of them, or folders that hold them
    wandb: str = ""  # in place of them: ENTITY/PROJECT or ENTITY/PROJECT/GROUP of W&B
    out: Path = Path("compare.html")  # the page
    target: float | None = None
    """a return to wait for; by default the highest that all groups have reached"""


@dataclasses.dataclass(frozen=True)
class WorkspaceArgs(Settings):
    """Saves a W&B workspace that compares groups of seeds over environment steps."""

    project: str = "jmql"  # of W&B
    entity: str = ""  # of W&B; empty: the account's default


@dataclasses.dataclass(frozen=True)
class SweepArgs(Settings):
    """Runs a sweep: prints the jobs of a YAML file, one command each, or runs them."""

    file: Path  # of name, base, grid, points and seeds; see docs/sweeps.md
    where: Literal["print", "local", "tpu"] = "print"
    """print: as a script for a shell; local: on this machine; tpu: on Cloud TPU, by SkyPilot"""
    jobs: int = count(1)  # processes at a time, here; each has as many cores
    population: Literal["auto", "off"] | int = count("auto")
    """at most so many runs that differ in seeds and numbers share a process, side by side; auto: 8,
    and on the cores of this machine 1, for there it is no faster"""
    bucket: str = ""  # gs://BUCKET/FOLDER, on Cloud TPU: for runs and compiled programs
    tpu: str = "v6e"  # a job file of experiments/launch


@dataclasses.dataclass(frozen=True)
class SweepStatusArgs(Settings):
    """Says how far the runs of a sweep are."""

    file: Path  # of the sweep
    bucket: str = ""  # gs://BUCKET/FOLDER, on Cloud TPU; empty: on this machine


@dataclasses.dataclass(frozen=True)
class SweepStopArgs(Settings):
    """Cancels the jobs of a sweep on Cloud TPU; submitted again, they go on."""

    file: Path  # of the sweep


@dataclasses.dataclass(frozen=True)
class BenchArgs(Settings):
    """Measures learner, collection, adaptation and compilation; writes a JSON file."""

    out: Path = Path("experiments/results")  # folder of the JSON file
    repeats: int = count(5)  # timed calls, of which the median counts
    parts: tuple[Literal["learner", "collection", "adaptation", "physics", "cycle"], ...] = (
        "learner",
        "collection",
        "adaptation",
        "physics",
        "cycle",
    )
    """what to measure; the rest of the JSON file stays as it is"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(_run(words))
    except ConfigError as error:
        print(f"jmql: {error}", file=sys.stderr)
        sys.exit(2)
    except (RunFailed, KeyboardInterrupt) as error:
        print(f"jmql: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(1)


def _run(words: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "evaluate": _evaluate,
        "export": _export,
        "report": _report,
        "compare": _compare,
        "workspace": _workspace,
        "sweep": _sweep,
        "sweep-status": _sweep_status,
        "sweep-stop": _sweep_stop,
        "bench": _bench,
    }
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: jmql {{{','.join(commands)}}} [--help] ...", file=sys.stderr)
        return 0 if words else 2
    command = _known("command", words[0], commands)
    _quiet()
    return commands[command](words[1:])


def _train(words: list[str]) -> int:
    with Stop() as stop:
        runs = _members(words)
        from experiments import devices, train

        for config in runs:
            config.validate()
        whole = dataclasses.replace(runs[0], seeds=sum(config.seeds for config in runs))
        devices.prepare(devices.count(whole, devices.cores()))
        if whole.distributed:
            return _on_many_hosts(runs, stop)
        return train.train(runs, stop)


def _on_many_hosts(runs: list[RunConfig], stop: Stop) -> int:
    """Trains on all hosts that run this command. One that fails must not wait for the others, nor
    they for it: it ends without the farewell that JAX has them take.
    """
    from experiments import hosts, train

    hosts.join()
    try:
        with hosts.together():
            return train.train(runs, stop)
    except ConfigError as error:
        code, text = 2, str(error)
    except RunFailed as error:
        code, text = 1, str(error)
    except Exception as error:  # which on another host than the first is in no log
        traceback.print_exc()
        code, text = 1, f"{type(error).__name__}: {error}"
    print(f"jmql: {text}", file=sys.stderr, flush=True)
    os._exit(code)


def _members(words: list[str]) -> list[RunConfig]:
    """Returns the runs of a command line: one, or one for each `--member WORDS`, whose words stand
    after the others.
    """
    shared, own = [], []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--member":
            own.append(value if equals else next(rest, ""))
            if not own[-1].strip():
                raise ConfigError("--member has no words; valid: such as --member '--seed 1'")
        else:
            shared.append(word)
    try:
        return [_train_config([*shared, *shlex.split(member)]) for member in own or [""]]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--member is {own}: {error}; valid: words of a command line") from None


def _train_config(words: list[str]) -> RunConfig:
    import envs
    from experiments import presets, run

    resume = _value(words, "resume")
    if resume is not None:
        if not resume:
            raise ConfigError("no run directory given to --resume; valid: runs/<task>/<run_id>")
        return _parse(RunConfig, "train", words, run.read_config(Path(resume)))
    task = _value(words, "task")
    if task is None and {"-h", "--help"} & set(words):
        return _parse(RunConfig, "train", words, RunConfig())  # prints, and exits
    # Task, algorithm, profile and backend choose the defaults that all other flags change.
    if task is None or ":" not in task:
        task = _known("task", task, envs.FAMILIES)
    algorithm = _known("algorithm", _value(words, "algorithm", "mql"), presets.ALGORITHMS)
    profile = _known(
        f"profile of {task}", _value(words, "profile", "quick"), presets.profiles(task, algorithm)
    )
    config = _parse(RunConfig, "train", words, presets.preset(task, profile, algorithm))
    _known(f"backend of {task}", config.backend, envs.load(task).backends)
    return config


def _evaluate(words: list[str]) -> int:
    from experiments import devices, evaluate, run

    given = _value(words, "run")
    if given is None or {"-h", "--help"} & set(words):
        _parse(EvaluateArgs, "evaluate", words)  # says that it is missing, or helps
    folder = Path(given or "")
    config = run.read_config(folder)
    default = EvaluateArgs(
        run=folder, adapt=config.adapt, propensity=config.propensity, evaluate=config.evaluate
    )
    args = _parse(EvaluateArgs, "evaluate", words, default)
    args.validate()
    measured = {name: getattr(args, name) for name in ("adapt", "propensity", "evaluate")}
    config = dataclasses.replace(config, devices=args.devices, **measured)
    devices.prepare(devices.count(config, devices.cores()))
    evaluate.evaluate(folder, config, args)
    return 0


def _export(words: list[str]) -> int:
    args = _parse(ExportArgs, "export", words)
    args.validate()
    from experiments import devices, export, run

    config = dataclasses.replace(run.read_config(args.run), devices=1)
    devices.prepare(1)
    export.export(args.run, config, args.out, args.seed, args.replay)
    return 0


def _report(words: list[str]) -> int:
    args = _parse(ReportArgs, "report", words)
    _needs("plotly")
    from experiments import devices

    devices.prepare(1)
    from experiments.report import report

    report.make(args.run, args.episodes)
    return 0


def _compare(words: list[str]) -> int:
    args = _parse(CompareArgs, "compare", words)
    _needs("plotly")
    _without_accelerators()
    from experiments.report import compare

    compare.compare(args.runs, args.wandb, args.out, args.target)
    return 0


def _workspace(words: list[str]) -> int:
    args = _parse(WorkspaceArgs, "workspace", words)
    _needs("wandb_workspaces")
    from experiments.report import workspace

    workspace.save(args.entity, args.project)
    return 0


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise ConfigError(f"{name} is not here; valid: after .venv/bin/pip install {name}")


def _without_accelerators() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")


def _sweep(words: list[str]) -> int:
    args = _parse(SweepArgs, "sweep", _file_first(words))
    args.validate()
    with Stop() as stop:
        from experiments import devices

        most = 1 if args.population == "off" else args.population
        if most == "auto":
            most = 1 if args.where == "local" and not devices.accelerated() else 8
        batches = _batches(args.file, most)
        if args.where == "print":
            from experiments import sweep

            for line in sweep.listing(batches):
                print(line)
            return 0
        if args.where == "tpu":
            from experiments import cloud

            return cloud.submit(batches, args.bucket, args.tpu)
        from experiments import here

        return here.sweep(batches, args.jobs, stop)


def _sweep_status(words: list[str]) -> int:
    args = _parse(SweepStatusArgs, "sweep-status", _file_first(words))
    from experiments import cloud

    return cloud.status(_batches(args.file), args.bucket)


def _sweep_stop(words: list[str]) -> int:
    args = _parse(SweepStopArgs, "sweep-stop", _file_first(words))
    from experiments import cloud

    return cloud.stop(_batches(args.file))


def _file_first(words: list[str]) -> list[str]:
    return ["--file", *words] if words and not words[0].startswith("-") else words


def _batches(file: Path, most: int = 1) -> Any:
    """Returns the jobs of a sweep in batches; accelerators are left to them."""
    _without_accelerators()
    from experiments import sweep

    jobs = sweep.read(file, _train_config)
    return sweep.batches(jobs, most)


def _bench(words: list[str]) -> int:
    args = _parse(BenchArgs, "bench", words)
    args.validate()
    from experiments import bench, devices

    devices.prepare(devices.cores())
    bench.bench(args.out, args.repeats, args.parts)
    return 0


def _known(kind: str, name: str | None, valid: Any) -> str:
    """Returns `name` if it is valid; else says what is, the nearest first."""
    if name is not None and name in valid:
        return name
    what = f"unknown {kind} {name!r}" if name else f"no {kind} given"
    near = difflib.get_close_matches(name or "", valid, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{what}; {hint}valid: {', '.join(valid)}")


def _value(words: list[str], flag: str, default: str | None = None) -> str | None:
    """Returns the last value given for `--flag`."""
    for i in range(len(words) - 1, -1, -1):
        name, _, value = words[i].partition("=")
        if name == f"--{flag}":
            return value or (words[i + 1] if i + 1 < len(words) else "")
    return default


def _parse(kind: Any, command: str, words: list[str], default: Any = None) -> Any:
    """Parses flags with tyro, its error boxes turned into one line."""
    import tyro

    error, chosen = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(error):
            parsed, unknown = tyro.cli(
                kind, prog=f"jmql {command}", args=words, return_unknown_args=True, **chosen
            )
    except SystemExit as exit:
        if exit.code:
            raise ConfigError(_one_line(error.getvalue())) from None
        raise
    if unknown:
        flags = [f"--{name.replace('_', '-')}" for name in flatten(parsed)]
        near = difflib.get_close_matches(unknown[0].replace("_", "-"), flags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"unknown flag {unknown[0]}; {hint}`jmql {command} --help` lists the valid ones"
        )
    return parsed


def _one_line(box: str) -> str:
    """Returns the message of one of tyro's boxes: what stands between the first two rules."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        line = line.strip(" │")
        if re.fullmatch(r"[╭╰─].*|-{5,}", line):
            parts.append([])
        else:
            parts[-1].append(line)
    return " ".join(parts[1 if len(parts) > 1 else 0]).strip()


def _quiet() -> None:
    """Keeps the terminal for results: warnings go to log.txt once there is a run directory."""
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.captureWarnings(True)
    logging.getLogger().handlers = [logging.NullHandler()]
    # Where a save fails, orbax closes its event loop while threads of tensorstore still report to
    # it, and their errors have no caller.
    sys.unraisablehook = lambda it: logging.error(
        "%s: %r", it.err_msg or "ignored in", it.object, exc_info=it.exc_value
    )
    logging.raiseExceptions = False  # a full disk cannot take a log line either
    for name in ("stdout", "stderr"):
        # A process may be started with none.
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, View(stream))


if __name__ == "__main__":
    main()
