"""What a run is made of, and the numbers of every (task, profile)."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic

from jmql.config import (
    AdaptConfig,
    CollectConfig,
    Config,
    ConfigError,
    EvaluateConfig,
    NetworkConfig,
    PropensityConfig,
    TaskConfig,
    TD3Config,
    TrainConfig,
)


class RunFailed(Exception):
    """Something broke that is not the user's fault; the message names the file that says more."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where results go beside the run directory."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE, else online if there is a key, else offline"""
    project: str = "jmql"


@dataclass(frozen=True)
class CheckpointConfig:
    """What survives a run that is stopped."""

    minutes: float = 5.0  # between saves; the first is made after warm-up, the last at the end
    replay: bool = True
    """save the replay too; without it a resumed run fills it anew, and is not exact"""


@dataclass(frozen=True)
class RunConfig(Config):
    """Meta-trains on a family of tasks and adapts to held-out ones."""

    task: str = ""  # task family
    profile: str = "quick"  # named set of numbers that the flags below change
    backend: str = ""  # physics engine
    seed: int = 0  # of the first run
    seeds: int = 1  # runs side by side in one process, with seeds seed, seed + 1, ...
    runs: str = "runs"  # folder that holds run directories
    split: str = "iid"  # how training and held-out tasks differ: iid, ood, or one of the family's
    observe_task: bool = False  # baseline: the observation shows the task (an oracle)
    resume: str = ""  # a run directory: go on where it stopped
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


# Meta-Q-Learning's released commands, tabulated in docs/method.md section 3. Rows are the training
# tasks; unroll, updates and rounds give the reference's updates per environment step and an
# evaluation about every 10,000 steps. Warm-up is max(10,000, tasks * steps per task).
_PAPER: dict[str, dict[str, Any]] = {
    "cheetah_dir": dict(
        network=NetworkConfig(context_size=20, history_length=20),
        td3=TD3Config(learning_rate=3e-4, policy_delay=2, target_noise=0.3),
        collect=CollectConfig(rows=2, unroll=100, exploration_noise=0.3, warmup_steps=10_000),
        train=TrainConfig(updates_per_round=500, rounds_per_cycle=50),
        propensity=PropensityConfig(0.5, 1.5, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=10, step2_updates=50, batch_multiple=10),
        evaluate=EvaluateConfig(episodes=4),
        tasks=TaskConfig(train=2, held_out=2),
    ),
    "cheetah_vel": dict(
        network=NetworkConfig(context_size=15, history_length=20),
        td3=TD3Config(learning_rate=1e-3, policy_delay=2, target_noise=0.3),
        collect=CollectConfig(rows=100, unroll=20, exploration_noise=0.3, warmup_steps=50_000),
        train=TrainConfig(updates_per_round=2000, rounds_per_cycle=5),
        propensity=PropensityConfig(0.1, 1.0, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=10, step2_updates=100, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2),
        tasks=TaskConfig(train=100, held_out=30),
    ),
    "ant_dir": dict(
        network=NetworkConfig(context_size=30, history_length=25),
        td3=TD3Config(learning_rate=3e-4, policy_delay=4, target_noise=0.4),
        collect=CollectConfig(rows=2, unroll=100, exploration_noise=0.2, warmup_steps=10_000),
        train=TrainConfig(updates_per_round=200, rounds_per_cycle=50),
        propensity=PropensityConfig(0.05, 1.2, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=5, step2_updates=400, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=4, history_length=200),
        tasks=TaskConfig(train=2, held_out=2),
    ),
    "ant_goal": dict(
        network=NetworkConfig(context_size=40, history_length=40),
        td3=TD3Config(learning_rate=4e-4, policy_delay=4, target_noise=0.3),
        collect=CollectConfig(rows=150, unroll=20, exploration_noise=0.3, warmup_steps=225_000),
        train=TrainConfig(updates_per_round=600, rounds_per_cycle=3),
        propensity=PropensityConfig(0.1, 2.0, observation=True, recent_per_task=1000),
        adapt=AdaptConfig(step1_updates=10, step2_updates=150, batch_multiple=1),
        evaluate=EvaluateConfig(episodes=2, history_length=200),
        tasks=TaskConfig(train=150, held_out=30),
    ),
    "humanoid_dir": dict(
        network=NetworkConfig(context_size=20, history_length=15),
        td3=TD3Config(learning_rate=3e-4, policy_delay=3, target_noise=0.3),
        collect=CollectConfig(
            rows=100,
            unroll=20,
            exploration_noise=0.2,
            warmup_steps=100_000,
            replay_capacity=500_000,
        ),
        train=TrainConfig(updates_per_round=5000, rounds_per_cycle=5),
        propensity=PropensityConfig(0.1, 2.0, observation=True, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=5, step2_updates=15, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2, history_length=200),
        tasks=TaskConfig(train=100, held_out=30),
    ),
    "walker_params": dict(
        network=NetworkConfig(context_size=30, history_length=10),
        td3=TD3Config(learning_rate=8e-4, policy_delay=3, target_noise=0.2),
        collect=CollectConfig(rows=40, unroll=25, exploration_noise=0.2, warmup_steps=80_000),
        train=TrainConfig(updates_per_round=200, rounds_per_cycle=10),
        propensity=PropensityConfig(0.06, 1.1, observation=True, recent_per_task=4000),
        adapt=AdaptConfig(step1_updates=10, step2_updates=400, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2),
        tasks=TaskConfig(train=40, held_out=10),
    ),
}
# The reference's classifier neither balances its classes nor scales its features.
for _numbers in _PAPER.values():
    _numbers["propensity"] = dataclasses.replace(
        _numbers["propensity"], balanced=False, standardized=False
    )
    _numbers["backend"] = "mjx"

# Two CPU cores, about ten minutes: small networks, short histories, many rows, Brax's spring
# engine. Measured in experiments/results/quick.
_QUICK_TD3 = TD3Config(learning_rate=1e-3, batch_size=128)
_QUICK_ADAPT = AdaptConfig(learning_rate=3e-4, step1_updates=10, step2_updates=40, batch_multiple=2)


def _quick_brax(env_steps: int, tasks: TaskConfig, held_out_episodes: int) -> dict[str, Any]:
    return dict(
        network=NetworkConfig(hidden_sizes=(128, 128), context_size=10, history_length=15),
        td3=_QUICK_TD3,
        collect=CollectConfig(rows=32, unroll=50, warmup_steps=16_000),
        train=TrainConfig(env_steps=env_steps, updates_per_round=400, rounds_per_cycle=20),
        adapt=_QUICK_ADAPT,
        evaluate=EvaluateConfig(episodes=held_out_episodes),
        tasks=tasks,
        backend="spring",
    )


_QUICK_POINT: dict[str, Any] = dict(
    network=NetworkConfig(hidden_sizes=(64, 64), context_size=16, history_length=20),
    td3=TD3Config(learning_rate=1e-3, batch_size=128),
    collect=CollectConfig(rows=32, unroll=50, warmup_steps=3200, replay_capacity=200_000),
    train=TrainConfig(env_steps=64_000, updates_per_round=500, rounds_per_cycle=4),
    adapt=AdaptConfig(learning_rate=3e-4, step1_updates=10, step2_updates=20, batch_multiple=1),
    tasks=TaskConfig(train=32, held_out=16),
    backend="none",
)
_QUICK: dict[str, dict[str, Any]] = {
    "ant_dir": _quick_brax(600_000, TaskConfig(train=2, held_out=2), 4),
    # Does not learn yet: goals are not inferred in so few updates (README, Results).
    "ant_goal": _quick_brax(1_200_000, TaskConfig(train=128, held_out=8), 1)
    | dict(
        td3=dataclasses.replace(_QUICK_TD3, learning_rate=5e-4, discount=0.97),
        collect=CollectConfig(rows=128, unroll=50, warmup_steps=32_000, replay_capacity=1_300_000),
        train=TrainConfig(env_steps=1_200_000, updates_per_round=400, rounds_per_cycle=15),
    ),
    "cheetah_dir": _quick_brax(400_000, TaskConfig(train=2, held_out=2), 4),
    "cheetah_vel": _quick_brax(300_000, TaskConfig(train=32, held_out=8), 1),
    "point_goal": _QUICK_POINT,
    "point_sparse": _QUICK_POINT,
}

_PROFILES = {"quick": _QUICK, "paper": _PAPER}


def profiles(task: str) -> list[str]:
    """Returns the profiles that a task family has."""
    return [name for name, table in _PROFILES.items() if task in table]


def tasks(profile: str) -> list[str]:
    """Returns the task families that a profile has."""
    return list(_PROFILES[profile])


def preset(task: str, profile: str) -> RunConfig:
    """Returns the configuration of a task family under one of its `profiles`."""
    return RunConfig(task=task, profile=profile, **_PROFILES[profile][task])


def from_json(text: str) -> RunConfig:
    """Returns a configuration from its JSON; settings that it does not name have their defaults.

    Raises:
        ConfigError: it is not a configuration; the message names the setting.
    """
    try:
        config = pydantic.TypeAdapter(RunConfig).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "config"
        raise ConfigError(f"{name} is {first['input']!r}: {first['msg']}") from None
    unknown = _names(json.loads(text)) - _names(dataclasses.asdict(config))
    if unknown:
        raise ConfigError(f"there is no setting {min(unknown)}")
    return config


def _names(settings: dict[str, Any], prefix: str = "") -> set[str]:
    names = set()
    for name, value in settings.items():
        names |= _names(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return names
