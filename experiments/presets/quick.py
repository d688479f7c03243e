"""Numbers with which learning is visible within minutes on a laptop."""

import dataclasses
from typing import Any

from jmql.config import (
    AdaptConfig,
    CollectConfig,
    EvaluateConfig,
    NetworkConfig,
    TaskConfig,
    TD3Config,
    TrainConfig,
)

# Two CPU cores, some minutes: small networks, short histories, many rows. What each number brought
# is measured in experiments/results/tuning, and what they give in experiments/results/quick.
_QUICK_TD3 = TD3Config(learning_rate=1e-3, batch_size=128)
_QUICK_NETWORK = NetworkConfig(
    hidden_sizes=(128, 128), context_size=10, history_length=15, normalize=True
)
_QUICK_COLLECT = CollectConfig(rows=32, unroll=50, warmup_steps=16_000)


def _quick_body(env_steps: int, tasks: TaskConfig, held_out_episodes: int) -> dict[str, Any]:
    return dict(
        network=_QUICK_NETWORK,
        td3=_QUICK_TD3,
        collect=_QUICK_COLLECT,
        train=TrainConfig(env_steps=env_steps, updates_per_round=400, rounds_per_cycle=20),
        evaluate=EvaluateConfig(episodes=held_out_episodes),
        tasks=tasks,
        backend="mjx",
    )


SINGLE = ("half_cheetah", "hopper", "walker2d", "ant", "humanoid")
# The point robot, and families from outside that have no engine.
POINT: dict[str, Any] = dict(
    network=NetworkConfig(
        hidden_sizes=(64, 64), context_size=16, history_length=20, normalize=True
    ),
    td3=TD3Config(learning_rate=1e-3, batch_size=128),
    collect=CollectConfig(rows=32, unroll=50, warmup_steps=3200, replay_capacity=200_000),
    train=TrainConfig(env_steps=64_000, updates_per_round=500, rounds_per_cycle=4),
    adapt=AdaptConfig(batch_multiple=1),
    tasks=TaskConfig(train=32, held_out=16),
    backend="none",
)
# Of a family from outside with a body.
BODY = _quick_body(400_000, TaskConfig(train=32, held_out=8), 1)
# The cheetah and the walker learn with less noise, the ant with more.
_CHEETAH_COLLECT = dataclasses.replace(_QUICK_COLLECT, exploration_noise=0.1)
PRESETS: dict[str, dict[str, Any]] = {
    "ant_dir": _quick_body(600_000, TaskConfig(train=2, held_out=2), 4),
    # Goals are told by small changes of the reward, and by those alone: contexts see changes, and
    # learn to tell many goals (docs/results.md, section 6).
    "ant_goal": _quick_body(800_000, TaskConfig(train=1024, held_out=16), 1)
    | dict(
        network=dataclasses.replace(_QUICK_NETWORK, context_size=32, changes=True, task_head=True),
        collect=CollectConfig(
            rows=1024,
            unroll=5,
            warmup_steps=52_000,
            exploration_noise=0.2,
            replay_capacity=1_300_000,
        ),
        train=TrainConfig(env_steps=800_000, updates_per_round=500, rounds_per_cycle=10),
        backend="spring",
    ),
    # A lift pays within a second: a short horizon, as for the speeds of the cheetah.
    "arm_pick": _quick_body(320_000, TaskConfig(train=32, held_out=16), 1)
    | dict(
        td3=dataclasses.replace(_QUICK_TD3, discount=0.97, target_noise=0.2),
        collect=dataclasses.replace(_QUICK_COLLECT, exploration_noise=0.2),
        train=TrainConfig(env_steps=320_000, updates_per_round=500, rounds_per_cycle=20),
    ),
    "cheetah_dir": _quick_body(600_000, TaskConfig(train=2, held_out=2), 4)
    | dict(collect=_CHEETAH_COLLECT),
    # The right speed pays within a few steps: a short horizon is enough, and learns faster.
    "cheetah_vel": _quick_body(500_000, TaskConfig(train=32, held_out=8), 1)
    | dict(
        network=dataclasses.replace(_QUICK_NETWORK, history_length=10),
        td3=dataclasses.replace(_QUICK_TD3, discount=0.95),
        collect=_CHEETAH_COLLECT,
    ),
    # One task each, on Gymnasium's models: TD3 with a context, and nothing to adapt to.
    **dict.fromkeys(
        SINGLE,
        _quick_body(1_000_000, TaskConfig(train=1, held_out=1), 4) | dict(collect=_CHEETAH_COLLECT),
    ),
    "point_goal": POINT,
    "point_sparse": POINT,
    "walker_params": _quick_body(400_000, TaskConfig(train=32, held_out=8), 1)
    | dict(
        network=dataclasses.replace(_QUICK_NETWORK, history_length=10), collect=_CHEETAH_COLLECT
    ),
}
