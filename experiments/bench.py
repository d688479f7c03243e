"""How fast the parts are: learner, collection, adaptation; compilation and replay memory."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import envs
from experiments import guard, memory, presets, products, run
from experiments.config import RunConfig, RunFailed
from experiments.program import EQUAL, SHARED, Program, build, each
from experiments.terminal import console
from jmql import evaluate, mesh, rollout
from jmql.settings import ConfigError
from jmql.train import TrainState
from jmql.types import Key

Row = tuple[str, str, str, dict[str, Any]]  # a part, what, its size, and numbers

_RUNNERS = ("cheetah_dir", "ant_dir")
_UNITS = {"learner": "updates", "adaptation": "tasks"}
_UNITS |= dict.fromkeys(("collection", "physics", "cycle"), "env steps")
_ROWS = (1, 8, 64, 512, 4096)
_TASKS = (1, 8, 64, 512)
_SHARES = (128, 64, 32)  # of a batch of 256: what one of several devices has to do
_UPDATES = 100  # critic steps in a timed call
_STEPS = 50  # steps of each row in a timed call


def bench(out: Path, repeats: int, parts: Sequence[str]) -> None:
    """Measures, prints a table and writes bench-<device>.json, in which it replaces these parts.

    Args:
        out: the folder of the JSON file.
        repeats: timed calls of each program; the median counts.
        parts: what is measured.

    Raises:
        RunFailed: the learner has lost a third of its share of its bound, against the file before.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out is {out}; it must be a folder that can be written: {error}"
        ) from None
    guard.refuse_unwritable(out)
    cast(Any, jax.config).update("jax_enable_compilation_cache", False)  # compiling is measured
    results: list[dict[str, Any]] = []
    record = run.describe(paper("cheetah_dir"))
    source = {"git_commit": record["git_commit"], "repeats": repeats}
    device = record["platform"] + "-" + record["device"].replace(" ", "-").lower()
    path = out / f"bench-{device}.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not what a benchmark has written; move it away") from None

    # Before anything is measured: a family that does not fit is refused here.
    replay_bytes = {
        task: bytes_per_transition(build(paper(task))) for task in presets.tasks("paper")
    }

    def add(part: str, what: str, size: str, measured: dict[str, Any]) -> None:
        results.append({"part": part, "what": what, "size": size} | measured | source)
        speed = ""
        if "devices" in measured:
            digits = 1 if measured["per_second"] >= 10 else 3
            speed = f"{measured['per_second']:,.{digits}f} {_UNITS[part]}/s"
        speed += f" on {measured['devices']}" if speed else ""
        speed += f", {measured['of_bound']:.0%} of bound" if "of_bound" in measured else ""
        compiling = f"compile {measured['compile_seconds']:.1f} s"
        console.print(f"{part:<11}{what:<28}{size:>10}  {speed:>41}  {compiling}", soft_wrap=True)

    for row in measurements(parts, repeats):
        add(*row)
    for task, size in replay_bytes.items():
        console.print(f"replay {task}: {size:.0f} bytes per transition")

    left_out = ("config", "group", "backend", "seeds", "git_commit")
    record = {k: v for k, v in record.items() if k not in left_out}
    results = [x for x in before if x["part"] not in parts] + results
    record |= {
        "command": "make bench",
        "results": results,
        "replay_bytes_per_transition": replay_bytes,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}", soft_wrap=True)
    refuse_slower(results, before)


def refuse_slower(results: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Compares shares of the bound with those of an earlier benchmark.

    Raises:
        RunFailed: one has fallen by a third.
    """

    def shares(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
        return {(x["what"], x["devices"]): x["of_bound"] for x in rows if "of_bound" in x}

    earlier = shares(before)
    for name, share in shares(results).items():
        if share < 2 / 3 * earlier.get(name, 0.0):
            raise RunFailed(
                f"the learner of {name[0]} on {name[1]} runs at {share:.0%} of its matrix products"
                f" alone; in the file before it was {earlier[name]:.0%}"
            )


def measurements(parts: Sequence[str], repeats: int) -> Iterator[Row]:
    """Yields part, what, size and numbers of everything that is measured."""
    for task in presets.tasks("paper") if "learner" in parts else ():
        for program in alone_and_together(paper(task)):
            measured = learner(program, repeats)
            share = measured["per_second"] / bound(program, repeats)
            yield "learner", task, "batch 256", measured | {"of_bound": share}
    for share in _SHARES if "learner" in parts else ():
        measured = learner(build(a_share(paper("cheetah_dir"), share)), repeats)
        yield "learner", "cheetah_dir, a share", f"batch {share}", measured
    for task in _RUNNERS if "collection" in parts else ():
        config = dataclasses.replace(presets.preset(task, "quick"), backend="spring")
        for rows in _ROWS:
            for program in alone_and_together(_rows(config, rows)):
                measured = collection(program, repeats)
                yield "collection", f"{task} {config.backend}", f"{rows} rows", measured
        for program in alone_and_together(_rows(without_context(config), 64)):
            measured = collection(program, repeats)
            yield "collection", f"{task} {config.backend}, no context", "64 rows", measured
    for count in _TASKS if "adaptation" in parts else ():
        config = presets.preset("point_goal", "quick")
        tasks = dataclasses.replace(config.tasks, held_out=count)
        for program in alone_and_together(dataclasses.replace(config, tasks=tasks)):
            measured = adaptation(program, repeats)
            yield "adaptation", "point_goal", f"{count} tasks", measured
    for task in _RUNNERS if "adaptation" in parts else ():
        config = paper(task)
        config = dataclasses.replace(config, tasks=dataclasses.replace(config.tasks, held_out=1))
        for program in alone_and_together(config):
            measured = adaptation(program, repeats)
            yield "adaptation", f"{task}, as the paper", "1 task", measured
    on_cpu = jax.default_backend() == "cpu"
    for task in _bodies() if "physics" in parts else ():
        for backend in envs.load(task).backends:
            config = presets.preset(task, presets.profiles(task)[0])
            config = dataclasses.replace(config, backend=backend)
            few = (32, 64, 128) if backend == "mjx" else (64,)
            for rows in few if on_cpu else (64, 512, 4096):
                for program in alone_and_together(_rows(config, rows)):
                    measured = collection(program, repeats)
                    yield "physics", f"{task} {backend}", f"{rows} rows", measured
    for task in _families() if "cycle" in parts else ():
        for profile in presets.profiles(task):
            if profile == "tuned":  # the same shapes as `quick`
                continue
            config = presets.preset(task, profile)
            # Cycles of `paper` take minutes on CPU, and tell no more than the learner does.
            many = alone_and_together(config) if profile == "quick" else [build(config)]
            for program in many:
                measured = cycle(program, repeats if profile == "quick" else 0)
                yield "cycle", f"{task} {config.backend}", profile, measured


def learner(program: Program, repeats: int) -> dict[str, Any]:
    """Critic steps a second, drawing from a full replay included, at the configured sizes."""
    count = program.config.train.updates_per_round
    return measure(program, functools.partial(updates, program), EQUAL, count, repeats)


def bound(program: Program, repeats: int) -> float:
    """Updates a second if the matrix products of a device's share of them were all there is."""
    config = program.config
    share = build(a_share(config, config.td3.batch_size // program.mesh.shape[mesh.AXIS]))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), share.shapes)
    moves = 1 / config.td3.policy_delay  # of the actor, by update
    learn = functools.partial(updates, share)
    found = products.count(learn, one, jax.random.key(0), branch=moves)

    def compute(_: TrainState, key: Key) -> Any:
        return products.compute(found, _UPDATES, key)

    return float(measure(program, compute, EQUAL, _UPDATES, repeats)["per_second"])


def updates(program: Program, state: TrainState, key: Key) -> Any:
    """Learns once, as a round does."""
    flag, none = jnp.ones((), bool), jnp.int32(0)
    tasks = state.actors.env_state.task
    return program.learner.learn(state.agent, state.memory, tasks, key, flag, none)


def collection(program: Program, repeats: int) -> dict[str, Any]:
    """Environment steps a second with the policy and its context in the loop."""
    rows, env, learner = program.config.collect.rows, program.env, program.learner

    def collect(state: TrainState, key: Key) -> Any:
        policy = learner.explore(learner.actor(state.agent), jnp.zeros((), bool))
        return jax.vmap(
            lambda carry, key: rollout.collect(env, policy, carry, key, _STEPS, env.episode_length)
        )(state.actors, mesh.share(jax.random.split(key, rows)))

    return measure(program, collect, SHARED, rows * _STEPS, repeats)


def adaptation(program: Program, repeats: int) -> dict[str, Any]:
    """Held-out tasks a second: data, classifier, both steps and all evaluation episodes."""

    def adapt(state: TrainState, key: Key) -> Any:
        return evaluate.evaluate(
            program.config,
            program.env,
            program.learner,
            state.agent,
            state.memory,
            program.held_out,
            key,
        )[0]

    return measure(program, adapt, EQUAL, program.config.tasks.held_out, repeats)


def bytes_per_transition(program: Program) -> float:
    """Replay memory over transitions kept."""
    kept = program.shapes.memory.data
    return memory.size(kept) / kept.reward.size


def measure(
    program: Program,
    function: Callable[[TrainState, Key], Any],
    results: Any,
    count: int,
    repeats: int,
) -> dict[str, Any]:
    """Compiles and times a function of a fresh TrainState with a full replay, and a key.

    Args:
        program: whose state, and whose devices.
        function: of one seed.
        results: where its results are, as in `Program.spread`.
        count: how many things it does in a call.
        repeats: timed calls.
    """
    state, key = program.init(program.keys), jax.random.key(0)
    full = jnp.full_like(state.memory.size, program.config.slots_per_row)
    state = state.replace(memory=state.memory.replace(size=full))
    run = program.spread(
        lambda state, key: each(lambda state: function(state, key), state), results, (P(),)
    )
    begun = time.monotonic()
    compiled = jax.jit(run).lower(state, key).compile()
    compile_seconds = time.monotonic() - begun
    jax.block_until_ready(compiled(state, key))
    seconds = []
    for _ in range(repeats):
        begun = time.monotonic()
        jax.block_until_ready(compiled(state, key))
        seconds.append(time.monotonic() - begun)
    return speeds(program, count, seconds) | {"compile_seconds": compile_seconds}


def cycle(program: Program, repeats: int) -> dict[str, Any]:
    """Seconds to trace and compile a cycle and, with repeats, environment steps a second in one."""
    begun = time.monotonic()
    compiled = program.compile()
    compiling = {"compile_seconds": time.monotonic() - begun}
    if not repeats:
        return compiling
    rounds, yes = jnp.int32(program.config.train.rounds_per_cycle), jnp.ones((), bool)
    state, seconds = program.init(program.keys), []
    for _ in range(1 + repeats):
        begun = time.monotonic()
        state, *_ = jax.block_until_ready(compiled(state, rounds, ~yes, yes, program.numbers))
        seconds.append(time.monotonic() - begun)
    steps = program.config.train.rounds_per_cycle * program.config.steps_per_round
    return speeds(program, steps, seconds[1:]) | compiling


def speeds(program: Program, count: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Describes calls of so many seconds, in each of which `count` things were done."""
    return {
        "devices": program.mesh.size,
        "per_second": count / float(np.median(seconds)),
        "slowest": count / max(seconds),
        "fastest": count / min(seconds),
    }


def alone_and_together(config: RunConfig) -> list[Program]:
    """Returns the program on one device and, where that helps, on several."""
    together = build(config)
    if together.mesh.size == 1:
        return [together]
    return [build(dataclasses.replace(config, devices=1)), together]


def _families() -> list[str]:
    """Returns what has several tasks."""
    return [task for task in envs.FAMILIES if envs.load(task).parameters]


def _bodies() -> list[str]:
    """Returns a family of each body: those of one body share its physics."""
    first: dict[str, str] = {}
    for task in _families():
        first.setdefault(envs.load(task).body, task)
    return list(first.values())


def paper(task: str) -> RunConfig:
    """The reference's sizes, on an engine that loads quickly: physics is not measured here."""
    config = presets.preset(task, "paper")
    short = dataclasses.replace(config.train, updates_per_round=_UPDATES)
    return dataclasses.replace(config, backend=envs.load(task).backends[0], train=short)


def a_share(config: RunConfig, batch_size: int) -> RunConfig:
    """One device, with batches of another size."""
    td3 = dataclasses.replace(config.td3, batch_size=batch_size)
    return dataclasses.replace(config, devices=1, td3=td3)


def without_context(config: RunConfig) -> RunConfig:
    """An agent that reads no history: what is saved is what the context costs."""
    return dataclasses.replace(
        config,
        network=dataclasses.replace(config.network, context_size=0, changes=False, task_head=False),
        propensity=dataclasses.replace(config.propensity, observation=True),
    )


def _rows(config: RunConfig, rows: int) -> RunConfig:
    return dataclasses.replace(
        config,
        collect=dataclasses.replace(config.collect, rows=rows, unroll=1),
        tasks=dataclasses.replace(config.tasks, train=1),
    )
