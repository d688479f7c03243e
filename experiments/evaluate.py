"""Studies of a trained run: adapts it to tasks that it has not met."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from experiments import guard, memory, run, statistics, terminal
from experiments.config import RunConfig, RunFailed, Study, all_seeds
from experiments.program import EQUAL, Program, each, explicit, learner_of
from experiments.program import split as named_split
from experiments.terminal import called, console
from jmql import evaluate as algorithm
from jmql.keys import derive
from jmql.learner import NewData
from jmql.settings import ConfigError, Kind, flatten
from jmql.train import TrainState
from jmql.types import Array, Key, Task

_CHUNK = 32  # tasks adapted side by side, each with an agent of its own
_BYTES = 64  # kept of each task, at the least

# What an ablation changes of `adapt`.
ABLATIONS: dict[str, dict[str, Any]] = {
    "weights of one": {"reuse": "uniform"},
    "new data alone": {"new_share": 1.0},
    "from nothing": {"new_share": 1.0, "prox_coef": 0.0},
}
_FROM_NOTHING = "from nothing"


class Result(NamedTuple):
    """What one way to adapt earned, leaves [S, N, ...] of seeds and tasks."""

    metrics: dict[str, np.ndarray]  # as those of `jmql.evaluate`
    data: NewData | None  # of all shots, where it is asked for


def evaluate(folder: Path, config: RunConfig, study: Study) -> None:
    """Draws tasks, adapts to each, prints the returns and appends them to evaluations.jsonl.

    Args:
        folder: a run directory.
        config: its configuration, in which what is measured with may have changed.
        study: what is asked.

    Raises:
        ConfigError: the folder is not a finished run, or a value cannot work.
    """
    for name in ("shots", "updates", "ablations") if config.algorithm != "mql" else ():
        if getattr(study, name):
            raise ConfigError(
                f"{name} is {getattr(study, name)}; valid for runs that adapt, and"
                f" {config.algorithm} does not"
            )
    if study.shots:
        shots = max(1, *study.shots)
        config = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, shots=shots))
    program = run.load(folder, config, min(study.num_tasks, _CHUNK))
    if program.learner.adapt and not program.config.checkpoint.replay:
        raise ConfigError(
            f"{folder} was saved without its replay (checkpoint.replay False);"
            " adaptation needs one: valid are runs that saved it"
        )
    task = program.config.task
    ranges = program.held_out_ranges
    if study.split:
        ranges = named_split(program.env, task, study.split)[1]
    ranges = ranges | explicit(program.env, task, study.ranges)
    # Of each task its returns are kept, and for what begins from nothing its data.
    steps = config.adapt.shots * config.adapt.episodes * program.env.episode_length
    replay = program.shapes.memory.data
    kept = memory.size(replay) // replay.reward.size * steps if study.ablations else 0
    memory.refuse_too_much(
        f"an evaluation of {study.num_tasks:,} tasks",
        config.seeds * study.num_tasks * (_BYTES + 2 * kept),
    )
    with guard.logged(folder):
        oracle = _oracle(program, Path(study.oracle)) if study.oracle else None
        _evaluate(folder, program, study, ranges, oracle)


def prepare(
    program: Program,
    state: TrainState,
    tasks: Task,
    key: Key,
    from_data: NewData | None = None,
    with_data: bool = False,
) -> Callable[[int], Result]:
    """Compiles adaptation to N tasks, some of them at a time.

    Args:
        program: what was trained, with the settings to adapt with.
        state: leaves [S, ...].
        tasks: leaves [N, ...].
        key: of episodes and draws.
        from_data: adapts weights that have learned nothing, to these data of the tasks [S, N, ...].
        with_data: return the data, too.

    Returns:
        A function of the updates of each shot, whatever the settings say of them.
    """
    num_tasks = len(jax.tree.leaves(tasks)[0])
    size = min(num_tasks, _CHUNK)

    def arguments(i: int, updates: int) -> tuple[Any, ...]:
        """Those of chunk i. The last is filled up from the beginning."""
        index = np.arange(i * size, (i + 1) * size) % num_tasks
        given = jax.tree.map(lambda x: jnp.asarray(x[:, index]), from_data)
        some = jax.tree.map(lambda x: x[index], tasks)
        return state, given, some, jax.random.fold_in(key, i), jnp.int32(updates)

    def evaluated(
        state: TrainState, given: NewData | None, tasks: Task, key: Key, updates: Array
    ) -> Any:
        # A number that is not known yet when this is compiled.
        adapt = dataclasses.replace(program.config.adapt, updates=cast(int, updates))
        config, env = dataclasses.replace(program.config, adapt=adapt), program.env
        learner = learner_of(config, env)

        def one(state: TrainState, given: NewData | None) -> Any:
            agent = state.agent
            if given is not None:
                sizes = (env.observation_size, env.action_size)
                agent = learner.init(derive(state.key, "from nothing"), *map(jnp.zeros, sizes))
            metrics, data = algorithm.evaluate(
                config, env, learner, agent, state.memory, tasks, key, given
            )
            return metrics, data if with_data else None

        return each(one, state, given)

    everywhere = jax.jit(program.spread(evaluated, EQUAL, (EQUAL, P(), P(), P())))
    compiled = everywhere.lower(*arguments(0, 0)).compile()
    needed = memory.in_one(memory.of_program(compiled), program.mesh)
    memory.refuse_too_much(f"this evaluation ({memory.SETTINGS} and num_tasks make it)", needed)

    def adapted(updates: int) -> Result:
        parts = [
            jax.device_get(compiled(*arguments(i, updates))) for i in range(-(-num_tasks // size))
        ]
        return Result(*jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :num_tasks], *parts))

    return adapted


def _evaluate(
    folder: Path,
    program: Program,
    study: Study,
    ranges: dict[str, Any],
    oracle: tuple[Program, TrainState] | None,
) -> None:
    state, key = run.trained(folder, program), jax.random.key(study.seed)
    tasks = program.env.sample_tasks(derive(key, "fresh tasks"), study.num_tasks, ranges)
    key = derive(key, "fresh evaluation")
    of = f"on {study.num_tasks} fresh held-out tasks"
    ways: dict[str, tuple[Program, Result]] = {}
    what = "adapting to" if program.learner.adapt else "playing"
    with console.status(f"{what} {study.num_tasks} tasks") as status:
        adapt = prepare(program, state, tasks, key, with_data=study.ablations)
        as_set = adapt(program.config.adapt.updates)
        ways["as set"] = program, as_set
        for name, changes in ABLATIONS.items() if study.ablations else ():
            status.update(f"adapting with {name} {of}")
            other = changed(program, changes)
            data = as_set.data if name == _FROM_NOTHING else None
            result = prepare(other, state, tasks, key, data)(other.config.adapt.updates)
            ways[name] = other, result
        for updates in study.updates:
            status.update(f"adapting with {updates} updates {of}")
            other = changed(program, {"updates": updates})
            ways[f"{updates} updates a shot"] = other, adapt(updates)
        if oracle is not None:
            status.update(f"playing by the oracle {of}")
            other, sees = oracle
            ways["oracle"] = other, prepare(other, sees, tasks, key)(0)
    stages, steps = _stages(program, study), _steps(program, state)
    gains = len(program.stages) > 1
    terminal.table(
        f"{program.config.task} after {steps:,} steps, {of}: interquartile mean of returns, with"
        " 95 % intervals",
        [*stages, *(["gain"] if gains else []), "worst fifth"],
        [(name, _cells(result, [*stages.values()], gains)) for name, (_, result) in ways.items()],
    )
    for extra in terminal.extras(as_set.metrics):
        at = [stage.replace("return", extra) for stage in stages.values()]
        means = [
            (way, [f"{result.metrics[stage].mean():.2f}" for stage in at])
            for way, (_, result) in ways.items()
        ]
        terminal.table(f"{extra}, mean", stages, means)
    zero_share = _summary(program, as_set).get("adapt/beta_zero_share", np.zeros(0))
    terminal.warn_if_reuse_is_off(zero_share.tolist())
    failed = as_set.metrics["failed"]
    names, blew_up = terminal.task_names(program.env, tasks), as_set.metrics["blew_up"].sum()
    terminal.warn_of_troubles(0, blew_up, failed.sum(), failed.tolist(), names, program.env)
    common = {
        "num_tasks": study.num_tasks,
        "task_seed": study.seed,
        "ranges": ranges,
        "tasks/parameters": _numbers(tasks),
        "train_tasks": _numbers(program.train_tasks),
    }
    rows = []
    for name, (by, result) in ways.items():
        told = common | {"adapted": name, "env_steps": steps}
        if oracle is not None and by is oracle[0]:
            told |= {"oracle": study.oracle, "env_steps": _steps(*oracle)}
        rows += _rows(by, result, told)
    _write(folder / "evaluations.jsonl", rows)


def _numbers(tasks: Task) -> dict[str, list[Any]]:
    return {name: np.asarray(leaf).tolist() for name, leaf in tasks.items()}


def _steps(program: Program, state: TrainState) -> int:
    return int(state.rounds[0]) * program.config.steps_per_round


def _oracle(program: Program, folder: Path) -> tuple[Program, TrainState]:
    """Returns a run that sees the task, and does not adapt.

    Raises:
        ConfigError: it is another family's, or does not see the task.
    """
    config, wanted = run.read_config(folder), {"observe_task": True}
    same = ("task", "backend", "algorithm", "context_span")
    wanted |= {name: getattr(program.config, name) for name in same}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"oracle is {folder}, whose {name} is {getattr(config, name)}; valid: a run whose"
                f" {name} is {value}"
            )
    idle = program.config.adapt
    if program.learner.adapt:
        idle = dataclasses.replace(idle, step1_updates=0, updates=0)
    episodes = program.config.evaluate.episodes
    config = dataclasses.replace(
        config,
        adapt=idle,
        evaluate=dataclasses.replace(config.evaluate, episodes=episodes),
        devices=program.config.devices,
    )
    oracle = run.load(folder, config)
    return oracle, run.trained(folder, oracle)


def changed(program: Program, adapt: dict[str, Any]) -> Program:
    """Returns the program with other settings of adaptation."""
    config = program.config
    config = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, **adapt))
    return dataclasses.replace(program, config=config, learner=learner_of(config, program.env))


def _stages(program: Program, study: Study) -> dict[str, str]:
    """Returns the returns to show by what they are called: of the shots that are asked for, or of
    all.
    """
    if study.shots:
        first, _, *shots = program.stages
        names = ["before", *(f"shot {i}" for i in range(1, 1 + len(shots)))]
        return {names[i]: (first, *shots)[i] for i in sorted(set(study.shots))}
    stages = terminal.shown(program)
    return {called(program.config, stage): stage for stage in stages}


def _cells(result: Result, stages: list[str], gains: bool = True) -> list[str]:
    """Returns what a table shows of each stage, of the mean gain of the last over no adaptation, if
    there is any, and of the worst fifth after the last.
    """
    returns = [result.metrics[stage] for stage in stages]

    def cell(values: np.ndarray, statistic: statistics.Statistic) -> str:
        low, high = statistics.interval(values, statistic)
        digits = 0 if max(abs(low), abs(high)) >= 100 else 1
        return f"{statistic(values.ravel()):.1f}\n[{low:.{digits}f}, {high:.{digits}f}]"

    shown = [cell(values, statistics.interquartile_mean) for values in returns]
    if gains:
        shown.append(cell(returns[-1] - result.metrics["return_pre"], statistics.mean))
    return [*shown, f"{statistics.worst_fifth(returns[-1].ravel()):.1f}"]


def _summary(program: Program, result: Result) -> dict[str, np.ndarray]:
    """Returns what is reported of each seed, [S] by name."""
    summarize = functools.partial(algorithm.summarize, program.learner)
    found = jax.vmap(summarize)(jax.tree.map(jnp.asarray, result.metrics))
    return cast(dict[str, np.ndarray], jax.device_get(found))


def _rows(program: Program, result: Result, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row of evaluations.jsonl for each seed."""
    summary, rows = _summary(program, result), []
    for i, trained in enumerate(all_seeds(program.config)):
        row: dict[str, Any] = {"seed": trained} | common
        row["measured"] = flatten(program.config, Kind.MEASURED)
        row |= {k: float(v[i]) for k, v in sorted(summary.items()) if np.isfinite(v[i])}
        for name in (*program.stages, *({"reuse"} & result.metrics.keys())):
            row[f"tasks/{name}"] = result.metrics[name][i].tolist()
        row["tasks/failed"] = result.metrics["failed"][i].astype(int).tolist()
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RunFailed(f"these numbers are not kept, {path} cannot be written: {error}") from None
    console.print(f"written to {path}", soft_wrap=True)
