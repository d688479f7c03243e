"""Humanoid family: run in a direction (docs/tasks.md section 1).

Contact forces are zero in MuJoCo 2.0 and later: the observation shows the zeros, so that its size
is that of the benchmark, and the cost leaves them out. Only mjx runs it: inertias, velocities and
motor forces as observed are MuJoCo's own, and the other engines do not keep them.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Array, Film, Ranges, Task
from envs.locomotion import control_cost, heading
from envs.physics import Body, Engine

_TIMESTEP = 0.003


class HumanoidDir(Body):
    """Task `angle`, U[0, 2 pi]: reward is 0.25 of the centre of mass's way in that direction,
    over the length of a physics step, - 0.1 sum a^2 + 5.
    """

    worst_reward = -20.0  # more than 19 m/s the wrong way
    parameters: ClassVar = {"angle": "which way to run, from the x axis (rad)"}
    ranges: ClassVar = {"angle": (0.0, 2 * math.pi)}
    limits: ClassVar = {"angle": (-7.0, 7.0)}
    splits: ClassVar = {
        "ood": ({"angle": (0.0, 1.5 * math.pi)}, {"angle": (1.5 * math.pi, 2 * math.pi)})
    }
    caption = "run in a\ndirection"
    film = Film(elevation=20.0, azimuth=35.0, seconds=0.45, height=2.35)
    body = "humanoid"
    model = "humanoid.xml"
    engines: ClassVar = {
        "mjx": Engine(timestep=_TIMESTEP, substeps=5, runge_kutta=True, contacts=16)
    }
    reset_noise = 0.01
    normal_velocity = False

    @classmethod
    def title(cls, task: Task) -> str:
        """The direction, in degrees."""
        return f"{np.degrees(float(task['angle'])):.0f}°"

    @classmethod
    def way(cls, task: Task) -> np.ndarray:
        """The direction."""
        return np.asarray(heading(task["angle"]))

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a direction."""
        low, high = ranges["angle"]
        return {"angle": jax.random.uniform(key, minval=low, maxval=high)}

    def observe(self, physics: Any, task: Task) -> Array:
        """[376] = qpos[2:] 22, qvel 23, and of 14 bodies, the world first: inertia 140, velocity
        84; motor forces 23; contact forces 84.
        """
        velocity = self.body_velocity(physics)
        return jnp.concatenate(
            [
                self.position(physics)[2:],
                self.velocity(physics),
                self.body_inertia(physics).ravel(),
                velocity.ravel(),
                self.motor_force(physics),
                jnp.zeros(velocity.size),
            ]
        )

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """The way in the wanted direction, less the cost of control, plus 5 for being healthy."""
        way = self.center_of_mass(after)[:2] - self.center_of_mass(before)[:2]
        forward = jnp.sum(way * heading(task["angle"])) / _TIMESTEP
        return 0.25 * forward - control_cost(self.control(action), 0.1) + 5.0

    def unhealthy(self, physics: Any) -> Array:
        """The torso is below 1 m or above 2 m."""
        height = self.position(physics)[2]
        return (height < 1.0) | (height > 2.0)
