"""Meta-Q-Learning's released numbers, on MuJoCo's physics."""

import dataclasses
from typing import Any

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

# Meta-Q-Learning's released commands, tabulated in docs/method.md section 3. Rows are the training
# tasks; unroll, updates and rounds give the reference's updates per environment step and an
# evaluation about every 10,000 steps. Warm-up is max(10,000, tasks * steps per task).
PRESETS: dict[str, dict[str, Any]] = {
    "cheetah_dir": dict(
        network=NetworkConfig(context_size=20, history_length=20),
        td3=TD3Config(learning_rate=3e-4, policy_delay=2, target_noise=0.3),
        collect=CollectConfig(rows=2, unroll=100, exploration_noise=0.3, warmup_steps=10_000),
        train=TrainConfig(updates_per_round=500, rounds_per_cycle=50),
        propensity=PropensityConfig(0.5, 1.5, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=10, updates=50, batch_multiple=10),
        evaluate=EvaluateConfig(episodes=4),
        tasks=TaskConfig(train=2, held_out=2),
    ),
    "cheetah_vel": dict(
        network=NetworkConfig(context_size=15, history_length=20),
        td3=TD3Config(learning_rate=1e-3, policy_delay=2, target_noise=0.3),
        collect=CollectConfig(rows=100, unroll=20, exploration_noise=0.3, warmup_steps=50_000),
        train=TrainConfig(updates_per_round=2000, rounds_per_cycle=5),
        propensity=PropensityConfig(0.1, 1.0, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=10, updates=100, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2),
        tasks=TaskConfig(train=100, held_out=30),
    ),
    "ant_dir": dict(
        network=NetworkConfig(context_size=30, history_length=25),
        td3=TD3Config(learning_rate=3e-4, policy_delay=4, target_noise=0.4),
        collect=CollectConfig(rows=2, unroll=100, exploration_noise=0.2, warmup_steps=10_000),
        train=TrainConfig(updates_per_round=200, rounds_per_cycle=50),
        propensity=PropensityConfig(0.05, 1.2, recent_per_task=2000),
        adapt=AdaptConfig(step1_updates=5, updates=400, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=4, history_length=200),
        tasks=TaskConfig(train=2, held_out=2),
    ),
    "ant_goal": dict(
        network=NetworkConfig(context_size=40, history_length=40),
        td3=TD3Config(learning_rate=4e-4, policy_delay=4, target_noise=0.3),
        collect=CollectConfig(rows=150, unroll=20, exploration_noise=0.3, warmup_steps=225_000),
        train=TrainConfig(updates_per_round=600, rounds_per_cycle=3),
        propensity=PropensityConfig(0.1, 2.0, observation=True, recent_per_task=1000),
        adapt=AdaptConfig(step1_updates=10, updates=150, batch_multiple=1),
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
        adapt=AdaptConfig(step1_updates=5, updates=15, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2, history_length=200),
        tasks=TaskConfig(train=100, held_out=30),
    ),
    "walker_params": dict(
        network=NetworkConfig(context_size=30, history_length=10),
        td3=TD3Config(learning_rate=8e-4, policy_delay=3, target_noise=0.2),
        collect=CollectConfig(rows=40, unroll=25, exploration_noise=0.2, warmup_steps=80_000),
        train=TrainConfig(updates_per_round=200, rounds_per_cycle=10),
        propensity=PropensityConfig(0.06, 1.1, observation=True, recent_per_task=4000),
        adapt=AdaptConfig(step1_updates=10, updates=400, batch_multiple=5),
        evaluate=EvaluateConfig(episodes=2),
        tasks=TaskConfig(train=40, held_out=10),
    ),
}
# The reference's classifier neither balances its classes nor scales its features. New data are
# played without noise, and have no share in the batches after step 1. The targets move as in
# training.
for _numbers in PRESETS.values():
    _numbers["adapt"] = dataclasses.replace(
        _numbers["adapt"],
        exploration_noise=0.0,
        learning_rate=1e-3,
        tau=0.005,
        new_share=0.0,
        prox_coef=0.1,
    )
    _numbers["propensity"] = dataclasses.replace(
        _numbers["propensity"], balanced=False, standardized=False
    )
    _numbers["backend"] = "mjx"
