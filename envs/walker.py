"""Walker family: run forward on a body of another build (docs/tasks.md section 1).

Only mjx runs it: Brax's spring and positional engines read neither damping nor inertia.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Array, Film, Ranges, Task
from envs.locomotion import control_cost, speed
from envs.physics import Body, Engine

_BODIES, _DOFS, _GEOMS = 7, 9, 8  # without the world; with the floor


class WalkerParams(Body):
    """Task: factors on the body's `mass` [7], `inertia` [7, 3], joint `damping` [9] and `friction`
    [8, 3], each base^U(-3, 3), the base 1.3 for damping and 1.5 else. Reward is speed + 1 -
    0.001 sum a^2.

    The range `exponent` is of the exponent's size; its sign is drawn apart.
    """

    worst_reward = -20.0  # more than 20 m/s backward
    parameters: ClassVar = {
        "mass": "of each body (factor)",
        "inertia": "of each body, about its three axes (factor)",
        "damping": "of each degree of freedom (factor)",
        "friction": "of each geom: sliding, torsional, rolling (factor)",
        "exponent": "size of the exponents of all factors",
    }
    ranges: ClassVar = {"exponent": (0.0, 3.0)}
    limits: ClassVar = {"exponent": (0.0, 6.0)}
    splits: ClassVar = {"ood": ({"exponent": (0.0, 2.0)}, {"exponent": (2.0, 3.0)})}
    caption = "run with a body\nof another build"
    film = Film(elevation=0.0, azimuth=0.0, seconds=0.4, height=2.15)
    body = "walker"
    model = "walker2d.xml"
    engines: ClassVar = {"mjx": Engine(timestep=0.004, substeps=4, runge_kutta=True, contacts=8)}
    reset_noise = 0.005
    normal_velocity = False

    @classmethod
    def title(cls, task: Task) -> str:
        """How much the masses vary."""
        mass = np.asarray(task["mass"])
        return f"masses × {mass.min():.1f} to {mass.max():.1f}"

    @classmethod
    def way(cls, task: Task) -> np.ndarray:  # noqa: ARG003
        """Forward."""
        return np.array([1.0, 0.0])

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws a body."""
        mass_key, inertia_key, damping_key, friction_key = jax.random.split(key, 4)

        def scale(key: Array, base: float, shape: tuple[int, ...]) -> Array:
            size_key, sign_key = jax.random.split(key)
            low, high = ranges["exponent"]
            size = jax.random.uniform(size_key, shape, minval=low, maxval=high)
            return base ** (size * jax.random.rademacher(sign_key, shape, size.dtype))

        return {
            "mass": scale(mass_key, 1.5, (_BODIES,)),
            "inertia": scale(inertia_key, 1.5, (_BODIES, 3)),
            "damping": scale(damping_key, 1.3, (_DOFS,)),
            "friction": scale(friction_key, 1.5, (_GEOMS, 3)),
        }

    def system(self, task: Task) -> Any:
        """The body of the task."""
        return self.scaled_system(**task)

    def observe(self, physics: Any, task: Task) -> Array:
        """[17] = qpos[1:] 8, qvel within [-10, 10] 9."""
        velocity = jnp.clip(self.velocity(physics), -10.0, 10.0)
        return jnp.concatenate([self.position(physics)[1:], velocity])

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Forward speed, less the cost of control, plus 1 for being healthy."""
        return speed(self, before, after) - control_cost(action, 0.001) + 1.0

    def unhealthy(self, physics: Any) -> Array:
        """The torso is not between 0.8 m and 2 m, or leans by 1 rad or more."""
        _, height, pitch = self.position(physics)[:3]
        return (height <= 0.8) | (height >= 2.0) | (jnp.abs(pitch) >= 1.0)
