"""Ant families: run forward or backward, or to a goal (docs/tasks.md section 1).

Contact forces are left out of observations and costs: they are zero in MuJoCo 2.0 and later.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Array, Film, Ranges, Task
from envs.locomotion import control_cost, heading, side
from envs.physics import Body, Engine


class Ant(Body):
    """The body, with Brax's own settings for its engines."""

    body = "ant"
    film = Film(elevation=30.0, azimuth=15.0, seconds=0.7, height=1.8)
    model = "ant.xml"
    engines: ClassVar = {
        "spring": Engine(timestep=0.005, substeps=10),
        "positional": Engine(timestep=0.005, substeps=10, gear=(200.0,) * 8),
        "generalized": Engine(timestep=0.01, substeps=5),
        "mjx": Engine(timestep=0.01, substeps=5, runge_kutta=True, contacts=8),
    }


class AntDir(Ant):
    """Task `angle`, 0 or pi: reward is the torso's speed that way - 0.5 sum a^2 + 1."""

    worst_reward = -20.0  # more than 17 m/s the wrong way
    parameters: ClassVar = {"angle": "which way to run, from the x axis (rad)"}
    caption = "run forward\nor backward"

    @classmethod
    def title(cls, task: Task) -> str:
        """Forward or backward."""
        return side(np.cos(task["angle"]))

    @classmethod
    def way(cls, task: Task) -> np.ndarray:
        """The direction."""
        return np.asarray(heading(task["angle"]))

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws forward or backward."""
        return {"angle": jnp.pi * jax.random.bernoulli(key).astype(float)}

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Returns both directions in turn: the family has only two tasks."""
        return {"angle": jnp.resize(jnp.array([0.0, jnp.pi]), (num,))}

    def observe(self, physics: Any, task: Task) -> Array:
        """[27] = qpos[2:] 13, qvel 14."""
        return jnp.concatenate([self.position(physics)[2:], self.velocity(physics)])

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Speed in the wanted direction, less the cost of control, plus 1 for being healthy."""
        velocity = (self.torso(after)[:2] - self.torso(before)[:2]) / self.dt
        forward = jnp.sum(velocity * heading(task["angle"]))
        return forward - control_cost(action, 0.5) + 1.0

    def unhealthy(self, physics: Any) -> Array:
        """The torso is below 0.2 m or above 1 m."""
        height = self.position(physics)[2]
        return (height < 0.2) | (height > 1.0)


class AntGoal(Ant):
    """Task `goal` [2], uniform in a disc of radius 3 m: reward -L1 distance - 0.1 sum a^2.

    The ranges `radius` (m) and `angle` (rad) cut a sector or a ring out of the disc.
    """

    parameters: ClassVar = {
        "goal": "where to go, x and y (m)",
        "radius": "distance of the goal from the start (m)",
        "angle": "direction of the goal, from the x axis (rad)",
    }
    worst_reward = -60.0  # more than 59 m away: 4 m/s for a whole episode, and the farthest goal
    ranges: ClassVar = {"radius": (0.0, 3.0), "angle": (0.0, 2 * math.pi)}
    limits: ClassVar = {"radius": (0.0, 10.0), "angle": (-7.0, 7.0)}
    splits: ClassVar = {"ood": ({"radius": (0.0, 2.0)}, {"radius": (2.0, 3.0)})}
    caption = "go to a place\nwithin 3 m"

    @classmethod
    def title(cls, task: Task) -> str:
        """The goal."""
        x, y = map(float, task["goal"])
        return f"({x:z.1f}, {y:z.1f}) m"

    @classmethod
    def way(cls, task: Task) -> np.ndarray:
        """The direction of the goal."""
        goal = np.asarray(task["goal"])
        return goal / np.hypot(*goal)

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a goal."""
        angle_key, radius_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, minval=ranges["angle"][0], maxval=ranges["angle"][1])
        low, high = ranges["radius"]  # uniform in area, so the square of the radius is uniform
        radius = jnp.sqrt(jax.random.uniform(radius_key, minval=low**2, maxval=high**2))
        return {"goal": radius * heading(angle)}

    def observe(self, physics: Any, task: Task) -> Array:
        """[29] = qpos 15, qvel 14."""
        return jnp.concatenate([self.position(physics), self.velocity(physics)])

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Distance to the goal and cost of control, both negative."""
        distance = jnp.sum(jnp.abs(self.torso(after)[:2] - task["goal"]))
        return -distance - control_cost(action, 0.1)
