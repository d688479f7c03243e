"""What is compiled: the environment, the algorithm and the tasks that a configuration names."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import envs
from envs.base import Environment
from experiments import devices, hosts, memory
from experiments.config import RunConfig, all_seeds
from jmql import cycle, mesh, mql, p3o, settings, train
from jmql.config import Ranges
from jmql.keys import derive
from jmql.learner import Learner
from jmql.replay import ReplayState
from jmql.settings import LARGEST_INT, ConfigError, replaced
from jmql.train import TrainState
from jmql.types import Array, Key, Metrics, Task

# Where a TrainState [S, ...] is: the devices of a seed share its rows, and each has its weights.
SHARED = P(devices.SEEDS, mesh.AXIS)
EQUAL = P(devices.SEEDS)
STATE = cast(Any, TrainState)(
    agent=EQUAL,
    memory=cast(Any, ReplayState)(data=SHARED, cursor=EQUAL, size=EQUAL),
    actors=SHARED,
    key=EQUAL,
    rounds=EQUAL,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """One run or several side by side (`experiments.population`), ready to be compiled."""

    config: RunConfig  # of the first run, but that `seeds` are those of all
    runs: tuple[RunConfig, ...]  # in the order of S, which the seeds of all of them make
    env: Environment
    learner: Learner
    train_tasks: Task  # leaves [config.tasks.train, ...]
    held_out: Task  # leaves [K, ...]
    held_out_ranges: dict[str, tuple[float, float]]  # what they were drawn from
    mesh: Mesh  # devices [seeds, rows]
    shapes: TrainState  # of every seed, leaves [S, ...], with the devices that hold them

    @functools.cached_property
    def init(self) -> Callable[[Key], TrainState]:
        """A function that returns the TrainState of every seed, leaves [S, ...], for keys [S]."""
        one = functools.partial(train.init, self.config, self.env, self.learner, self.train_tasks)
        return jax.jit(jax.vmap(one), out_shardings=shardings(self.mesh))

    def cycle(
        self,
        state: TrainState,
        rounds: Array,
        warmup: Array,
        measured: Array,
        numbers: Mapping[str, Array] | None = None,
    ) -> tuple[TrainState, Metrics, Metrics]:
        """Runs `cycle.cycle` for every seed, leaves of state and results [S, ...].

        Args:
            state, rounds, warmup, measured: as there.
            numbers: `Program.numbers`, where it is to be a value of what is compiled.
        """

        def seeds(
            state: TrainState, rounds: Array, warmup: Array, measured: Array, numbers: Any
        ) -> Any:
            updates = state.agent.updates[0]  # of every seed

            def one(state: TrainState, numbers: Mapping[str, Array]) -> Any:
                config = replaced(self.config, numbers)
                learner = learner_of(config, self.env)
                what = (config, self.env, learner, self.held_out)
                return cycle.cycle(*what, state, rounds, warmup, measured, updates)

            return each(one, state, numbers)

        run = self.spread(seeds, (STATE, EQUAL, EQUAL), (P(), P(), P(), EQUAL))
        numbers = self.numbers if numbers is None else numbers
        return cast(
            tuple[TrainState, Metrics, Metrics], run(state, rounds, warmup, measured, numbers)
        )

    def spread(
        self, function: Callable[..., Any], results: Any, others: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """Returns a function of a TrainState [S, ...] and other arrays, run on all devices.

        Args:
            function: of the part of the TrainState that a device holds, and of the others.
            results: where its results are, as a tree of `PartitionSpec`.
            others: where the other arguments are.
        """

        def everywhere(*arguments: Any) -> Any:
            # That what is computed from gathered data is equal everywhere, JAX could not prove.
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(STATE, *others),
                out_specs=results,
                check_vma=False,
            )(*arguments)

        return everywhere

    def compile(self) -> jax.stages.Compiled:
        """Returns `cycle` compiled ahead of time: it cannot be traced again, for other shapes are
        an error. Its state is donated.
        """
        flag = jnp.zeros((), bool)
        # Said, for XLA would put arrays without elements, which MJX's states have, elsewhere.
        results = None if hosts.count() == 1 else NamedSharding(self.mesh, P())  # each reads them
        where = (shardings(self.mesh), results, results)
        cycle = jax.jit(self.cycle, donate_argnums=0, out_shardings=where)
        return cycle.lower(self.shapes, jnp.int32(0), flag, flag, self.numbers).compile()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the returns of each stage, the meta-trained one first: `return_pre`, ..."""
        return tuple(f"return_{name}" for name in ("pre", *self.learner.stages))

    @property
    def ends(self) -> tuple[str, ...]:
        """The first of `stages` and the last, if there is another."""
        return tuple(dict.fromkeys((self.stages[0], self.stages[-1])))

    @property
    def keys(self) -> Key:
        """The key of every seed, [S]."""
        return jnp.stack([jax.random.key(seed) for run in self.runs for seed in all_seeds(run)])

    @property
    def numbers(self) -> dict[str, Array]:
        """What the compiled program takes as values, by dotted names, [S]: so that runs with other
        numbers find it in the compilation cache.
        """
        every = [settings.numbers(run) for run in self.runs for _ in all_seeds(run)]
        return {name: jnp.array([numbers[name] for numbers in every]) for name in every[0]}


def shardings(over: Mesh) -> Any:
    """Returns where a TrainState [S, ...] is, as a prefix of its tree."""
    return jax.tree.map(
        lambda spec: NamedSharding(over, spec), STATE, is_leaf=lambda x: isinstance(x, P)
    )


def each(function: Callable[..., Any], states: TrainState, *others: Any) -> Any:
    """Returns what a function gives for each of several seeds, all leaves [S, ...]."""
    if len(states.rounds) > 1:
        return jax.vmap(function)(states, *others)
    # Traced in half the time.
    lone = function(*jax.tree.map(lambda x: x[0], (states, *others)))
    return jax.tree.map(lambda x: x[None], lone)


def named(run: RunConfig) -> tuple[Environment, dict[str, Any], dict[str, Any]]:
    """Returns what a configuration names: the environment, and the ranges that training and
    held-out tasks are drawn from.

    Raises:
        ConfigError: there is no such thing.
    """
    try:
        env = envs.make(run.task, run.backend, observe_task=run.observe_task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    train_ranges, held_out_ranges = split(env, run.task, run.split)
    train_ranges |= explicit(env, run.task, run.tasks.train_ranges)
    held_out_ranges |= explicit(env, run.task, run.tasks.held_out_ranges)
    return env, train_ranges, held_out_ranges


def build(run: RunConfig, held_out_at_once: int | None = None) -> Program:
    """Builds environment, networks and tasks.

    Args:
        run: the configuration.
        held_out_at_once: tasks that are adapted to side by side; None: as in training, all.

    Raises:
        ConfigError: the configuration cannot work.
    """
    run.validate()
    env, train_ranges, held_out_ranges = named(run)
    refuse_uncounted(run, env)
    learner, key = learner_of(run, env), jax.random.key(run.tasks.seed)

    def draw(purpose: str, num: int, ranges: dict[str, Any]) -> Task:
        return env.sample_tasks(derive(key, purpose), num, ranges)

    def train_tasks() -> Task:
        return draw("training tasks", run.tasks.train, train_ranges)

    def held_out() -> Task:
        return draw("held-out tasks", run.tasks.held_out, held_out_ranges)

    def init(keys: Key, tasks: Task) -> TrainState:
        return jax.vmap(functools.partial(train.init, run, env, learner, tasks))(keys)

    # Nothing is allocated before it is known to fit.
    over, keys = devices.choose(run), jax.ShapeDtypeStruct((run.seeds,), key.dtype)
    shapes = jax.tree.map(
        lambda where, part: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), part
        ),
        shardings(over),
        jax.eval_shape(init, keys, jax.eval_shape(train_tasks)),
    )
    parts = {
        "replay": shapes.memory,
        "environments": shapes.actors,
        "learners": shapes.agent,
        "held-out tasks": jax.eval_shape(held_out),
    }
    count = held_out_at_once or run.tasks.held_out
    work = memory.at_least(run, env.episode_length, count, shapes, over)
    most = max(work, key=lambda what: work[what])
    sizes = {name: memory.size(part) for name, part in parts.items()}
    sizes[most] = memory.in_one(work[most], over)
    least = memory.of_state(shapes) + memory.size(parts["held-out tasks"]) + work[most]
    largest = ", ".join(f"{name} {memory.human_bytes(size)}" for name, size in sizes.items())
    memory.refuse_too_much(f"this run ({largest})", memory.in_one(least, over))
    tasks = train_tasks(), held_out()
    return Program(run, (run,), env, learner, *tasks, held_out_ranges, over, shapes)


def learner_of(run: RunConfig, env: Environment) -> Learner:
    """Returns the algorithm that a configuration names.

    Raises:
        ConfigError: contexts are to tell tasks of which there is nothing to tell.
    """
    if run.algorithm == "p3o":
        return p3o.learner(run, env.action_size)
    numbers = task_size(env)
    if run.network.task_head and not numbers:
        raise ConfigError(f"network.task_head is True; {run.task} is one task, so it must be False")
    return mql.learner(run, env.action_size, numbers)


def task_size(env: Environment) -> int:
    """Returns how many numbers a task of a family is."""
    one = jax.eval_shape(lambda key: env.sample_tasks(key, 1), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(one))


def refuse_uncounted(run: RunConfig, env: Environment) -> None:
    """Raises ConfigError if the classifier of adaptation would see more than can be counted."""
    adapt = run.adapt
    seen = 2 * (adapt.shots * adapt.episodes * env.episode_length + run.tasks.train)
    if seen > LARGEST_INT:
        raise ConfigError(
            f"adapt.shots is {adapt.shots} and adapt.episodes {adapt.episodes}; in episodes of"
            f" {env.episode_length} steps, with as many of replay, that is {seen:,} transitions,"
            f" and at most {LARGEST_INT:,} can be counted"
        )


def split(env: Environment, task: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the ranges of training and of held-out tasks under a named split.

    Raises:
        ConfigError: the family has no such split.
    """
    known = {"iid": ({}, {}), **env.splits}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{task} has no split {name!r}; {hint}valid: {', '.join(known)}")
    train, held_out = known[name]
    return dict(train), dict(held_out)


def explicit(env: Environment, task: str, ranges: Ranges) -> dict[str, Any]:
    """Returns ranges as they are set by hand.

    Raises:
        ConfigError: the family has no such parameter, it is given twice, or its range is empty or
            beyond the family's limits.
    """
    given: dict[str, tuple[float, float]] = {}
    for name, low, high in ranges:
        if name not in env.ranges:
            valid = ", ".join(env.ranges) or "none, for its tasks are a fixed few"
            raise ConfigError(f"{task} draws no {name!r}; valid: {valid}")
        if name in given:
            raise ConfigError(f"the range of {name} is given twice; valid: once")
        lowest, highest = env.limit(name)
        if not lowest <= low <= high <= highest:
            raise ConfigError(
                f"the range of {name} is {low:g} to {high:g}; valid: within {lowest:g} to"
                f" {highest:g}"
            )
        if not np.float32(low) < np.float32(high):
            raise ConfigError(f"the range of {name} is {low:g} to {high:g}; it must rise")
        given[name] = (low, high)
    return given
