"""What all task families share: state, reset, time limit, and the physics engine.

This is the only file that knows which engine runs. A family sees its physics through
`observe`, `reward` and `unhealthy`; it is written once for every backend.
Shapes are those of one row: vectorise with `jax.vmap`. Letters as in `jmql/types.py`.
"""

import abc
import contextlib
import dataclasses
import importlib
import io
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Task = dict[str, Array]

BACKENDS = ("spring", "positional", "generalized", "mjx")


class EnvState(struct.PyTreeNode):
    """One row between two steps."""

    physics: Any  # the engine's own state
    task: Task  # leaves of any shape, fixed over an episode
    observation: Array  # [O]
    reward: Array  # [] of the step that led here, 0 after reset
    terminated: Array  # [] bool: the task ended, there is no value beyond
    truncated: Array  # [] bool: the time limit was reached
    step: Array  # [] int32: steps taken since the episode began


class Environment(abc.ABC):
    """A family of tasks.

    Args:
        episode_length: steps after which an episode is truncated.
        observe_task: the observation ends with the task itself (the oracle baseline).
    """

    action_size: int

    def __init__(self, episode_length: int = 200, observe_task: bool = False):
        self.episode_length = episode_length
        self._observe_task = observe_task

    @abc.abstractmethod
    def sample_task(self, key: Array) -> Task:
        """Draws one task of the family."""

    def sample_tasks(self, key: Array, num: int) -> Task:
        """Draws `num` tasks; every leaf has a leading axis of that length."""
        return jax.vmap(self.sample_task)(jax.random.split(key, num))

    @abc.abstractmethod
    def start(self, key: Array) -> Any:
        """Returns the physics at the beginning of an episode."""

    @abc.abstractmethod
    def advance(self, physics: Any, action: Array) -> Any:
        """Returns the physics one control step later; action [A] in [-1, 1]."""

    @abc.abstractmethod
    def observe(self, physics: Any, task: Task) -> Array:
        """Returns the observation [O]; most families show nothing of the task."""

    @abc.abstractmethod
    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """Returns the reward [] of the step between two physics states."""

    def unhealthy(self, physics: Any) -> Array:
        """Returns whether the task has ended, [] bool."""
        return jnp.zeros((), bool)

    @property
    def observation_size(self) -> int:
        """O, without running the physics."""
        key = jax.random.key(0)
        state = jax.eval_shape(lambda: self.reset(key, self.sample_task(key)))
        return state.observation.shape[-1]

    def reset(self, key: Array, task: Task) -> EnvState:
        """Begins an episode of `task` from a fresh random state."""
        physics = self.start(key)
        return EnvState(
            physics=physics,
            task=task,
            observation=self._observation(physics, task),
            reward=jnp.zeros(()),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            step=jnp.zeros((), jnp.int32),
        )

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes one control step; an action [A] outside [-1, 1] is clipped first.

        Physics that is no longer finite ends the episode, with a finite observation and reward 0.
        """
        action = jnp.clip(action, -1.0, 1.0)
        physics = self.advance(state.physics, action)
        observation = self._observation(physics, state.task)
        reward = self.reward(state.physics, physics, action, state.task)
        finite = jnp.isfinite(observation).all() & jnp.isfinite(reward)
        step = state.step + 1
        terminated = self.unhealthy(physics) | ~finite
        return EnvState(
            physics=physics,
            task=state.task,
            observation=jnp.where(finite, observation, state.observation),
            reward=jnp.where(finite, reward, 0.0),
            terminated=terminated,
            truncated=(step >= self.episode_length) & ~terminated,
            step=step,
        )

    def _observation(self, physics: Any, task: Task) -> Array:
        observation = self.observe(physics, task)
        if self._observe_task:
            shown = [jnp.ravel(leaf) for leaf in jax.tree.leaves(task)]
            observation = jnp.concatenate([observation, *shown])
        return observation


@dataclasses.dataclass(frozen=True)
class Engine:
    """How one backend runs one body: physics steps, their length, and overridden motor gears."""

    timestep: float  # seconds
    substeps: int  # physics steps in a control step
    gear: tuple[float, ...] = ()  # empty: as in the model


class BraxEnvironment(Environment):
    """A family whose body is a Brax model.

    Subclasses name their `model` and, for each backend, the `Engine` that runs it.
    """

    model: str  # a file of brax/envs/assets
    engines: ClassVar[dict[str, Engine]]

    def __init__(self, backend: str = "spring", **kwargs: Any):
        super().__init__(**kwargs)
        engine = self.engines[backend]
        self._substeps = engine.substeps
        self._pipeline, self._system = _load(backend, self.model, engine)
        self.dt = engine.timestep * engine.substeps  # seconds of a control step
        self.action_size = self._system.act_size()
        self._free_joint = self._system.link_types.startswith("f")

    def start(self, key: Array) -> Any:
        """Positions at rest + U(-0.1, 0.1), velocities 0.1 N(0, 1)."""
        position_key, velocity_key = jax.random.split(key)
        system = self._system
        q = system.init_q + jax.random.uniform(
            position_key, (system.q_size(),), minval=-0.1, maxval=0.1
        )
        if self._free_joint:  # q[3:7] is an orientation, a unit quaternion
            q = q.at[3:7].divide(jnp.linalg.norm(q[3:7]))
        qd = 0.1 * jax.random.normal(velocity_key, (system.qd_size(),))
        return self._pipeline.init(system, q, qd)

    def advance(self, physics: Any, action: Array) -> Any:
        """Holds the action over all substeps."""

        def substep(physics: Any, _: None) -> tuple[Any, None]:
            return self._pipeline.step(self._system, physics, action), None

        return jax.lax.scan(substep, physics, None, length=self._substeps)[0]

    def position(self, physics: Any) -> Array:
        """Generalized positions, as MuJoCo's qpos (m, rad, quaternions)."""
        return physics.q

    def velocity(self, physics: Any) -> Array:
        """Generalized velocities, as MuJoCo's qvel (m/s, rad/s)."""
        return physics.qd

    def torso(self, physics: Any) -> Array:
        """Position of the first link in the world, [3] (m)."""
        return physics.x.pos[0]


def _load(backend: str, model: str, engine: Engine) -> tuple[Any, Any]:
    """Returns Brax's pipeline module of a backend and the System of a model."""
    # Importing MJX prints a notice when warp is missing; loading warns of Brax's state of
    # maintenance and of old attributes in its models. None of it is news to a user of JMQL.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mjcf = importlib.import_module("brax.io.mjcf")
        importlib.import_module("mujoco").set_mju_user_warning(lambda message: None)
        pipeline = importlib.import_module(f"brax.{backend}.pipeline")
        assets = importlib.import_module("etils.epath").resource_path("brax") / "envs/assets"
        system = mjcf.load(assets / model)
    system = system.tree_replace({"opt.timestep": engine.timestep})
    if engine.gear:
        gear = jnp.asarray(np.asarray(engine.gear), system.actuator.gear.dtype)
        system = system.replace(actuator=system.actuator.replace(gear=gear))
    return pipeline, system
