"""Half-cheetah families: run forward or backward, or at a given speed (docs/tasks.md section 1)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Array, Film, Ranges, Task
from envs.locomotion import control_cost, side, speed
from envs.physics import Body, Engine

# Brax's own settings of this model: its penalty-based engines need short steps and softer motors.
_SOFT = Engine(timestep=0.003125, substeps=16, gear=(120.0, 90.0, 60.0, 120.0, 100.0, 100.0))
_STIFF = Engine(timestep=0.01, substeps=5, contacts=8)


class Cheetah(Body):
    """The body, its observation [20] = qpos[1:] 8, qvel 9, torso position 3."""

    body = "cheetah"
    film = Film(elevation=0.0, azimuth=0.0, seconds=0.7, height=1.6)
    model = "half_cheetah.xml"
    engines: ClassVar = {"spring": _SOFT, "positional": _SOFT, "generalized": _STIFF, "mjx": _STIFF}
    worst_reward = -25.0  # more than 20 m/s away from what is asked for

    def observe(self, physics: Any, task: Task) -> Array:
        """Joint positions without x, velocities, and where the torso is."""
        position, velocity = self.position(physics), self.velocity(physics)
        return jnp.concatenate([position[1:], velocity, self.torso(physics)])


class CheetahDir(Cheetah):
    """Task `direction`, -1 or +1: reward is the speed that way - 0.05 sum a^2."""

    parameters: ClassVar = {"direction": "which way to run, -1 or +1 along x"}
    caption = "run forward\nor backward"

    @classmethod
    def title(cls, task: Task) -> str:
        """Forward or backward."""
        return side(task["direction"])

    @classmethod
    def way(cls, task: Task) -> np.ndarray:
        """The direction."""
        return np.array([float(task["direction"]), 0.0])

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a direction."""
        return {"direction": jax.random.rademacher(key, (), float)}

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Returns both directions in turn: the family has only two tasks."""
        return {"direction": jnp.resize(jnp.array([-1.0, 1.0]), (num,))}

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Speed in the wanted direction, less the cost of control."""
        return task["direction"] * speed(self, before, after) - control_cost(action, 0.05)


class CheetahVel(Cheetah):
    """Task `velocity`, U[0, 3] m/s: reward is -|speed - velocity| - 0.05 sum a^2.

    The splits `medium` and `hard` are the published ones.
    """

    parameters: ClassVar = {"velocity": "how fast to run, along x (m/s)"}
    ranges: ClassVar = {"velocity": (0.0, 3.0)}
    limits: ClassVar = {"velocity": (-10.0, 10.0)}
    splits: ClassVar = {
        "ood": ({"velocity": (0.0, 2.5)}, {"velocity": (2.5, 3.0)}),
        "medium": ({"velocity": (0.0, 2.5)}, {"velocity": (2.5, 3.0)}),
        "hard": ({"velocity": (0.0, 1.5)}, {"velocity": (2.5, 3.0)}),
    }
    caption = "run at a speed\nof 0 to 3 m/s"

    @classmethod
    def title(cls, task: Task) -> str:
        """The speed."""
        return f"{float(task['velocity']):.2f} m/s"

    @classmethod
    def way(cls, task: Task) -> np.ndarray:
        """Forward, longer where it is faster."""
        return np.array([float(task["velocity"]) / 2, 0.0])

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a target velocity."""
        low, high = ranges["velocity"]
        return {"velocity": jax.random.uniform(key, minval=low, maxval=high)}

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Distance from the wanted speed and cost of control, both negative."""
        miss = jnp.abs(speed(self, before, after) - task["velocity"])
        return -miss - control_cost(action, 0.05)
