"""A configuration of the point robot that compiles and runs in seconds."""

import dataclasses
from typing import Any

import jax
import numpy as np

import envs
from envs.base import Task
from envs.point import PointGoal
from experiments import program
from experiments.config import RunConfig
from experiments.loop import Member
from experiments.program import Program
from jmql.config import (
    AdaptConfig,
    CollectConfig,
    EvaluateConfig,
    NetworkConfig,
    PropensityConfig,
    TaskConfig,
    TD3Config,
    TrainConfig,
)

CONFIG = RunConfig(
    network=NetworkConfig(hidden_sizes=(16,), context_size=4, history_length=5, normalize=True),
    td3=TD3Config(batch_size=16, learning_rate=1e-2),
    collect=CollectConfig(rows=4, unroll=10, warmup_steps=80, replay_capacity=400),
    train=TrainConfig(env_steps=240, updates_per_round=6, rounds_per_cycle=2),
    propensity=PropensityConfig(recent_per_task=20, newton_steps=5),
    adapt=AdaptConfig(
        exploration_noise=0.0,
        learning_rate=1e-3,
        tau=0.005,
        step1_updates=2,
        updates=4,
        new_share=0.0,
        prox_coef=0.1,
    ),
    evaluate=EvaluateConfig(episodes=2),
    tasks=TaskConfig(train=4, held_out=3),
    task="point_goal",
    backend="none",
    seed=3,
    seeds=1,
)


class PointAndNothing(PointGoal):
    """The point robot; its physics has an array without elements, as MJX's has."""

    def start(self, key: jax.Array, task: Task) -> Any:
        return super().start(key, task), jax.numpy.zeros(0)

    def advance(self, physics: Any, action: jax.Array, task: Task) -> Any:
        return super().advance(physics[0], action, task), physics[1]

    def observe(self, physics: Any, task: Task) -> jax.Array:
        return physics[0]

    def reward(self, before: Any, after: Any, action: jax.Array, task: Task) -> jax.Array:
        return super().reward(before[0], after[0], action, task)


def changed(**components: dict[str, Any]) -> RunConfig:
    """Returns CONFIG with some settings changed, such as `td3={"tau": 0.1}`."""
    return dataclasses.replace(
        CONFIG,
        **{
            name: dataclasses.replace(getattr(CONFIG, name), **settings)
            for name, settings in components.items()
        },
    )


def build(config: RunConfig = CONFIG, episode_length: int = 20) -> Program:
    """Returns the program of a configuration, with short episodes."""
    env = envs.make(config.task, episode_length=episode_length)
    return dataclasses.replace(program.build(config), env=env)


def filled(built: Program) -> Any:
    """Returns the TrainState [] of the first seed after one round of warm-up."""
    from jmql import train

    config, env, learner = built.config, built.env, built.learner

    @jax.jit
    def fill(key: jax.Array) -> Any:
        state = train.init(config, env, learner, built.train_tasks, key)
        none = jax.numpy.int32(0)
        return train.round(config, env, learner, state, jax.numpy.array(True), none)[0]

    return fill(built.keys[0])


def measured(rounds: int, seeds: int, **changed: Any) -> tuple[dict, dict]:
    """What a cycle returns beside the state, all of it zero but what is named."""
    stages = ("return_pre", "return_step1", "return_post")
    names = [f"eval/{stage}" for stage in (*stages, "return_post_p20", "blew_up")]
    names += ["adapt/failed", "collect/blew_up", "train/critic_loss"]
    metrics = {name: np.zeros(seeds) for name in names}
    metrics |= {"rounds": np.full(seeds, rounds), "updates": np.zeros(seeds, int)}
    return metrics | changed, {name: np.zeros((seeds, 3)) for name in (*stages, "failed")}


class Rows(list):
    """A tracker that only keeps the rows of a run, those of all its cycles in one list."""

    def log(self, rows: list[dict[str, Any]]) -> None:
        self.extend(rows)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def lone(config: RunConfig) -> list[Member]:
    """Returns the one member of `loop.loop` that a run alone has, with a tracker of `Rows`."""
    return [Member(config, Rows())]
