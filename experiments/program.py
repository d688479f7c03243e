"""What is compiled: the environment, the algorithm and the tasks that a configuration names."""

import dataclasses
import difflib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.base import Environment
from experiments import memory
from experiments.config import RunConfig, all_seeds
from jmql import cycle, mql, train
from jmql.config import Ranges
from jmql.keys import derive
from jmql.learner import Learner
from jmql.settings import ConfigError
from jmql.train import TrainState
from jmql.types import Array, Key, Metrics, Task


@dataclasses.dataclass(frozen=True)
class Program:
    """A configuration and what it names, ready to be compiled."""

    config: RunConfig
    env: Environment
    learner: Learner
    train_tasks: Task  # leaves [config.tasks.train, ...]
    held_out: Task  # leaves [K, ...]
    held_out_ranges: dict[str, tuple[float, float]]  # what they were drawn from
    shapes: TrainState  # of every seed, leaves [S, ...]

    def init(self, keys: Key) -> TrainState:
        """Returns the TrainState of every seed, leaves [S, ...], for keys [S]."""
        one = functools.partial(train.init, self.config, self.env, self.learner, self.train_tasks)
        return jax.vmap(one)(keys)

    def cycle(
        self, state: TrainState, rounds: Array, warmup: Array, measured: Array
    ) -> tuple[TrainState, Metrics, Metrics]:
        """Runs `cycle.cycle` for every seed, leaves of state and results [S, ...]."""
        updates = state.agent.updates[0]  # of every seed

        def one(state: TrainState) -> tuple[TrainState, Metrics, Metrics]:
            return cycle.cycle(
                self.config,
                self.env,
                self.learner,
                self.held_out,
                state,
                rounds,
                warmup,
                measured,
                updates,
            )

        if self.config.seeds == 1:  # which is traced in half the time
            return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], state)))
        return jax.vmap(one)(state)

    def compile(self) -> jax.stages.Compiled:
        """Returns `cycle` compiled ahead of time: it cannot be traced again, for other shapes are
        an error. Its state is donated.
        """
        flag = jnp.zeros((), bool)
        cycle = jax.jit(self.cycle, donate_argnums=0)
        return cycle.lower(self.shapes, jnp.int32(0), flag, flag).compile()

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the returns of each stage, the meta-trained one first: `return_pre`, ..."""
        return tuple(f"return_{name}" for name in ("pre", *self.learner.stages))

    @property
    def keys(self) -> Key:
        """The key of every seed, [S]."""
        return jnp.stack([jax.random.key(seed) for seed in all_seeds(self.config)])


def build(run: RunConfig) -> Program:
    """Builds environment, networks and tasks.

    Raises:
        ConfigError: the configuration cannot work.
    """
    run.validate()
    try:
        env = envs.make(run.task, run.backend, observe_task=run.observe_task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    train_ranges, held_out_ranges = split(env, run.task, run.split)
    train_ranges |= explicit(env, run.task, run.tasks.train_ranges)
    held_out_ranges |= explicit(env, run.task, run.tasks.held_out_ranges)
    learner, key = mql.learner(run, env.action_size), jax.random.key(run.tasks.seed)

    def draw(purpose: str, num: int, ranges: dict[str, Any]) -> Task:
        return env.sample_tasks(derive(key, purpose), num, ranges)

    def train_tasks() -> Task:
        return draw("training tasks", run.tasks.train, train_ranges)

    def held_out() -> Task:
        return draw("held-out tasks", run.tasks.held_out, held_out_ranges)

    def init(keys: Key, tasks: Task) -> TrainState:
        return jax.vmap(functools.partial(train.init, run, env, learner, tasks))(keys)

    # Nothing is allocated before it is known to fit.
    keys = jax.ShapeDtypeStruct((run.seeds,), key.dtype)
    shapes = jax.eval_shape(init, keys, jax.eval_shape(train_tasks))
    count = memory.at_least(run, shapes) + memory.size(jax.eval_shape(held_out))
    parts = {
        "replay": shapes.memory,
        "environments": shapes.actors,
        "learners": shapes.agent,
        "held-out tasks": jax.eval_shape(held_out),
    }
    largest = ", ".join(f"{k} {memory.human_bytes(memory.size(v))}" for k, v in parts.items())
    memory.refuse_too_much(f"this run ({largest})", count)
    return Program(run, env, learner, train_tasks(), held_out(), held_out_ranges, shapes)


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
