"""Numbers of P3O: those of its release for single tasks, and those with which we saw it learn."""

import dataclasses
from typing import Any

from experiments.presets import quick
from jmql.config import (
    CollectConfig,
    EvaluateConfig,
    NetworkConfig,
    P3OConfig,
    TaskConfig,
    TrainConfig,
)

# The release: 16 rows, T 16, two tanh layers of 64; the rest is in `P3OConfig`. What it had for
# continuous control is lost.
_PAPER: dict[str, Any] = dict(
    network=NetworkConfig(hidden_sizes=(64, 64), context_size=0, normalize=True),
    collect=CollectConfig(rows=16, unroll=16, warmup_steps=1, replay_capacity=800_000),
    train=TrainConfig(env_steps=3_000_000, rounds_per_cycle=200),
    p3o=P3OConfig(),
    evaluate=EvaluateConfig(episodes=8),
    tasks=TaskConfig(train=1, held_out=1),
    backend="mjx",
)
# What each change brings is measured in experiments/results/p3o.
_OURS = P3OConfig(initial_std=0.5, entropy_coef=0.0, off_policy_after=10_000)
_TUNED = _PAPER | dict(
    collect=dataclasses.replace(_PAPER["collect"], replay_capacity=50_000), p3o=_OURS
)


def _family(numbers: dict[str, Any], more: int = 1) -> dict[str, Any]:
    """Returns numbers for a family, whose tasks, engine and length, but for a factor, are those of
    Meta-Q-Learning's `quick`.
    """
    rows = 32 * -(-numbers["tasks"].train // 32)
    return dict(
        network=NetworkConfig(hidden_sizes=(64, 64), context_size=32, normalize=True),
        collect=CollectConfig(rows=rows, unroll=20, warmup_steps=1, replay_capacity=50_000),
        train=TrainConfig(env_steps=more * numbers["train"].env_steps, rounds_per_cycle=100),
        p3o=dataclasses.replace(_OURS, minibatch=64),
        evaluate=numbers.get("evaluate", EvaluateConfig()),
        tasks=numbers["tasks"],
        backend=numbers["backend"],
    )


# A round of 1,024 rows, as Meta-Q-Learning has there, would be a large part of a run.
_GOALS = quick.PRESETS["ant_goal"] | dict(
    tasks=TaskConfig(train=128, held_out=8), train=TrainConfig(env_steps=1_200_000)
)
POINT, BODY = _family(quick.POINT, 10), _family(quick.BODY)
PAPER = dict.fromkeys(quick.SINGLE, _PAPER)
TUNED = dict.fromkeys(quick.SINGLE, _TUNED)
QUICK = (
    {task: _family(numbers) for task, numbers in quick.PRESETS.items()}
    | {"ant_goal": _family(_GOALS), "humanoid_dir": BODY}
    | dict.fromkeys(("point_goal", "point_sparse"), POINT)
    | dict.fromkeys(
        quick.SINGLE, _TUNED | dict(train=dataclasses.replace(_PAPER["train"], env_steps=1_000_000))
    )
)
