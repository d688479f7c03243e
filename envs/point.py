"""A point that walks in the plane towards a hidden goal: no engine, seconds to train."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from envs.base import Array, Environment, Ranges, Task
from envs.locomotion import heading


class PointGoal(Environment):
    """Task `goal` [2], on the half circle of radius 1 above the start: reward -distance."""

    body = "point"
    action_size = 2
    worst_reward = -30.0  # as far away as an episode can take it
    parameters: ClassVar = {
        "goal": "where to go, x and y",
        "angle": "direction of the goal, from the x axis (rad)",
    }
    ranges: ClassVar = {"angle": (0.0, math.pi)}
    limits: ClassVar = {"angle": (-7.0, 7.0)}
    splits: ClassVar = {
        "ood": ({"angle": (0.0, 0.75 * math.pi)}, {"angle": (0.75 * math.pi, math.pi)})
    }

    @classmethod
    def title(cls, task: Task) -> str:
        """The goal."""
        x, y = map(float, task["goal"])
        return f"({x:z.2f}, {y:z.2f})"

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a goal."""
        low, high = ranges["angle"]
        angle = jax.random.uniform(key, minval=low, maxval=high)
        return {"goal": heading(angle)}

    def start(self, key: Array, task: Task) -> Array:
        """A position [2] near the origin, + U(-0.1, 0.1)."""
        return jax.random.uniform(key, (2,), minval=-0.1, maxval=0.1)

    def advance(self, physics: Array, action: Array, task: Task) -> Array:
        """Moves by at most 0.1 along each axis."""
        return physics + 0.1 * action

    def observe(self, physics: Array, task: Task) -> Array:
        """[2]: the position."""
        return physics

    def reward(self, before: Any, after: Array, action: Array, task: Task) -> Array:
        """Minus the distance to the goal."""
        return -jnp.linalg.norm(after - task["goal"])


class PointSparse(PointGoal):
    """As PointGoal, with reward 1 within 0.2 of the goal and 0 elsewhere."""

    worst_reward = 0.0

    def reward(self, before: Any, after: Array, action: Array, task: Task) -> Array:
        """Whether the goal is near."""
        return (jnp.linalg.norm(after - task["goal"]) <= 0.2).astype(jnp.float32)
