"""Single tasks of Gymnasium, version 4, on its models: run forward for 1,000 steps.

Version 4 has the rewards of version 2, on which papers of 2016 to 2020 report. Their actions are
scaled here to [-1, 1] where a motor's range is another. Only mjx runs them.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from envs.ant import AntDir
from envs.base import Array, Film, Ranges, Task
from envs.cheetah import Cheetah
from envs.humanoid import HumanoidDir
from envs.locomotion import control_cost, speed
from envs.physics import Body, Engine

_FORWARD: Any = {"angle": np.zeros((), np.float32)}  # JAX would start its backend


class Single(Body):
    """A family of one task, which has no parameter: its leaf has no elements."""

    parameters: ClassVar = {}
    ranges: ClassVar = {}
    limits: ClassVar = {}
    splits: ClassVar = {}
    caption = "run forward"

    def __init__(self, backend: str, episode_length: int = 1000, **kwargs: Any):
        super().__init__(backend=backend, episode_length=episode_length, **kwargs)

    @classmethod
    def title(cls, task: Task) -> str:  # noqa: ARG003
        """Forward."""
        return "forward"

    @classmethod
    def way(cls, task: Task) -> np.ndarray:  # noqa: ARG003
        """Forward."""
        return np.array([1.0, 0.0])

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Returns the one task."""
        return {"none": jnp.zeros(0)}

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Returns the one task, so many times."""
        return {"none": jnp.zeros((num, 0))}


class HalfCheetah(Single, Cheetah):
    """HalfCheetah-v4: reward is speed - 0.1 sum a^2; nothing ends an episode."""

    engines: ClassVar = {"mjx": Cheetah.engines["mjx"]}

    def observe(self, physics: Any, task: Task) -> Array:
        """[17] = qpos[1:] 8, qvel 9."""
        return jnp.concatenate([self.position(physics)[1:], self.velocity(physics)])

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Forward speed, less the cost of control."""
        return speed(self, before, after) - control_cost(action, 0.1)


class Upright(Single):
    """A planar body that must stay upright: reward is speed + 1 - 0.001 sum a^2."""

    reset_noise = 0.005
    normal_velocity = False
    worst_reward = -20.0  # more than 20 m/s backward

    def observe(self, physics: Any, task: Task) -> Array:
        """qpos[1:], and qvel within [-10, 10]."""
        velocity = jnp.clip(self.velocity(physics), -10.0, 10.0)
        return jnp.concatenate([self.position(physics)[1:], velocity])

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Forward speed, less the cost of control, plus 1 for being healthy."""
        return speed(self, before, after) - control_cost(action, 0.001) + 1.0


class Hopper(Upright):
    """Hopper-v4, observation [11]."""

    body = "hopper"
    film = Film(elevation=0.0, azimuth=0.0, seconds=0.4, height=2.0)
    model = "hopper.xml"
    engines: ClassVar = {"mjx": Engine(timestep=0.002, substeps=4, runge_kutta=True, contacts=6)}

    def unhealthy(self, physics: Any) -> Array:
        """The torso is at 0.7 m or below, leans by 0.2 rad or more, or something is beyond 100."""
        position, velocity = self.position(physics), self.velocity(physics)
        _, height, pitch = position[:3]
        wild = (jnp.abs(jnp.concatenate([position[2:], velocity])) >= 100.0).any()
        return (height <= 0.7) | (jnp.abs(pitch) >= 0.2) | wild


class Walker2d(Upright):
    """Walker2d-v4, observation [17]."""

    body = "walker"
    film = Film(elevation=0.0, azimuth=0.0, seconds=0.4, height=2.15)
    model = "walker2d.xml"
    engines: ClassVar = {"mjx": Engine(timestep=0.002, substeps=4, runge_kutta=True, contacts=8)}

    def unhealthy(self, physics: Any) -> Array:
        """The torso is not between 0.8 m and 2 m, or leans by 1 rad or more."""
        _, height, pitch = self.position(physics)[:3]
        return (height <= 0.8) | (height >= 2.0) | (jnp.abs(pitch) >= 1.0)


class Ant(Single, AntDir):
    """Ant-v4 without contact forces, its default: `AntDir` forward."""

    engines: ClassVar = {"mjx": AntDir.engines["mjx"]}

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """As the family's, forward."""
        return AntDir.reward(self, before, after, action, _FORWARD)


class Humanoid(Single, HumanoidDir):
    """Humanoid-v4: `HumanoidDir` forward. Its contact forces are zeros here, as in MuJoCo 2.0."""

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """As the family's, forward."""
        return HumanoidDir.reward(self, before, after, action, _FORWARD)
