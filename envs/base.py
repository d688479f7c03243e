"""What all task families share: state, reset, time limit, and the physics engine.

This is the only file that knows which engine runs. A family sees its physics through
`observe`, `reward` and `unhealthy`; it is written once for every backend.
Shapes are those of one row: vectorise with `jax.vmap`. Letters as in `jmql/types.py`.
"""

import abc
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Task = dict[str, Array]
Ranges = Mapping[str, tuple[float, float]]  # what a parameter of a task is drawn from

_LIMIT = 1e10  # MuJoCo's mjMAXVAL; NaN is not below it either

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
    blew_up: Array  # [] bool: the physics was not finite, which is why the episode was truncated


class Environment(abc.ABC):
    """A family of tasks.

    Args:
        episode_length: steps after which an episode is truncated.
        observe_task: the observation ends with the task itself (the oracle baseline).
    """

    action_size: int
    worst_reward: float  # the least that a step can earn: what is below is raised to it
    ranges: ClassVar[Ranges] = {}  # the benchmark's own
    limits: ClassVar[Ranges] = {}  # by parameter: the widest range that makes sense
    splits: ClassVar[dict[str, tuple[Ranges, Ranges]]] = {}  # by name: of training, of held-out

    def __init__(self, episode_length: int = 200, observe_task: bool = False):
        self.episode_length = episode_length
        self._observe_task = observe_task

    @abc.abstractmethod
    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws one task, its parameters from `ranges`, all of which are given."""

    def sample_task(self, key: Array) -> Task:
        """Draws one task of the family."""
        return self.draw_task(key, self.ranges)

    def sample_tasks(self, key: Array, num: int, ranges: Ranges | None = None) -> Task:
        """Draws `num` tasks; every leaf has a leading axis of that length.

        Args:
            key: for the draw.
            num: how many.
            ranges: of some of the parameters, in place of the benchmark's.
        """
        whole = {**self.ranges, **(ranges or {})}
        return jax.vmap(lambda key: self.draw_task(key, whole))(jax.random.split(key, num))

    @abc.abstractmethod
    def start(self, key: Array, task: Task) -> Any:
        """Returns the physics at the beginning of an episode."""

    @abc.abstractmethod
    def advance(self, physics: Any, action: Array, task: Task) -> Any:
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
        physics = self.start(key, task)
        return EnvState(
            physics=physics,
            task=task,
            observation=self._observation(physics, task),
            reward=jnp.zeros(()),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            step=jnp.zeros((), jnp.int32),
            blew_up=jnp.zeros((), bool),
        )

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes one control step; an action [A] outside [-1, 1] is clipped first.

        Physics that is not finite, or beyond the bound at which MuJoCo calls it unstable, truncates
        the episode, with the observation before it and `worst_reward`: to a learner it is worth no
        more than a step at the worst reward that leads nowhere, so never more than playing on.
        """
        action = jnp.clip(action, -1.0, 1.0)
        physics = self.advance(state.physics, action, state.task)
        observation = self._observation(physics, state.task)
        reward = self.reward(state.physics, physics, action, state.task)
        finite = (jnp.abs(observation) < _LIMIT).all() & (jnp.abs(reward) < _LIMIT)
        step = state.step + 1
        terminated = self.unhealthy(physics) & finite
        return EnvState(
            physics=physics,
            task=state.task,
            observation=jnp.where(finite, observation, state.observation),
            reward=jnp.maximum(jnp.where(finite, reward, -jnp.inf), self.worst_reward),
            terminated=terminated,
            truncated=((step >= self.episode_length) | ~finite) & ~terminated,
            step=step,
            blew_up=~finite,
        )

    def _observation(self, physics: Any, task: Task) -> Array:
        observation = self.observe(physics, task)
        if self._observe_task:
            shown = [jnp.ravel(leaf) for leaf in jax.tree.leaves(task)]
            observation = jnp.concatenate([observation, *shown])
        return observation


class Capsules(NamedTuple):
    """Rods with round ends, which is what a body is made of."""

    ends: Array  # [G, 2, 3] the two ends of each rod's axis (m)
    radius: Array  # [G] (m)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How one backend runs one body: physics steps, their length, and what the model is not."""

    timestep: float  # seconds
    substeps: int  # physics steps in a control step
    gear: tuple[float, ...] = ()  # of the motors; empty: as in the model
    runge_kutta: bool = False  # mjx: by MuJoCo's Runge-Kutta of order 4, else by its Euler


class BraxEnvironment(Environment):
    """A family whose body is a MuJoCo model: Gymnasium's on `mjx`, elsewhere Brax's of that name.

    Subclasses name their `model` and, for each backend, the `Engine` that runs it.
    """

    model: str
    engines: ClassVar[dict[str, Engine]]
    reset_noise = 0.1  # largest distance of a first position from rest (m, rad)
    normal_velocity = True  # first velocities are reset_noise * N(0, 1), or drawn as positions are

    def __init__(self, backend: str, **kwargs: Any):
        super().__init__(**kwargs)
        engine = self.engines[backend]
        self._substeps = engine.substeps
        self._pipeline, self._system = _load(backend, self.model, engine)
        self._step = _runge_kutta if engine.runge_kutta else _one_step
        self._finish_reset = _drop_forces if backend == "mjx" else lambda physics: physics
        self.dt = engine.timestep * engine.substeps  # seconds of a control step
        self.action_size = self._system.act_size()
        self._free_joint = self._system.link_types.startswith("f")

    def system(self, task: Task) -> Any:
        """Returns the physical model that a task is played on: the same for all, unless said."""
        return self._system

    def start(self, key: Array, task: Task) -> Any:
        """Positions at rest + noise, velocities noise."""
        position_key, velocity_key = jax.random.split(key)
        system, noise = self.system(task), self.reset_noise
        q = system.init_q + jax.random.uniform(
            position_key, (system.q_size(),), minval=-noise, maxval=noise
        )
        if self._free_joint:  # q[3:7] is an orientation, a unit quaternion
            q = q.at[3:7].divide(jnp.linalg.norm(q[3:7]))
        shape = (system.qd_size(),)
        if self.normal_velocity:
            qd = noise * jax.random.normal(velocity_key, shape)
        else:
            qd = jax.random.uniform(velocity_key, shape, minval=-noise, maxval=noise)
        return self._finish_reset(self._pipeline.init(system, q, qd))

    def advance(self, physics: Any, action: Array, task: Task) -> Any:
        """Holds the action over all substeps."""
        system, control = self.system(task), self.control(action)

        def substep(physics: Any, _: None) -> tuple[Any, None]:
            return self._step(self._pipeline, system, physics, control), None

        return jax.lax.scan(substep, physics, None, length=self._substeps)[0]

    def control(self, action: Array) -> Array:
        """Returns an action [A] in [-1, 1], mapped to the range of the actuators."""
        low, high = self._system.actuator.ctrl_range.T
        return (high + low) / 2 + (high - low) / 2 * action

    def position(self, physics: Any) -> Array:
        """Generalized positions, as MuJoCo's qpos (m, rad, quaternions)."""
        return physics.q

    def velocity(self, physics: Any) -> Array:
        """Generalized velocities, as MuJoCo's qvel (m/s, rad/s)."""
        return physics.qd

    def torso(self, physics: Any) -> Array:
        """Position of the first link in the world, [3] (m)."""
        return physics.x.pos[0]

    def capsules(self, physics: Any) -> Capsules:
        """The shape of the body in the world, for pictures; a sphere is a capsule of length 0."""
        math = importlib.import_module("brax.math")
        system = self._system
        kinds = importlib.import_module("mujoco").mjtGeom
        geoms = np.flatnonzero(
            np.isin(system.geom_type, (kinds.mjGEOM_SPHERE, kinds.mjGEOM_CAPSULE))
        )
        links = system.geom_bodyid[geoms] - 1
        radius, half_length = system.geom_size[geoms, 0], system.geom_size[geoms, 1]

        def end(sign: float) -> Array:
            along = sign * half_length[:, None] * jnp.array([0.0, 0.0, 1.0])
            local = jax.vmap(math.rotate)(along, system.geom_quat[geoms]) + system.geom_pos[geoms]
            return physics.x.pos[links] + jax.vmap(math.rotate)(local, physics.x.rot[links])

        return Capsules(jnp.stack([end(-1.0), end(1.0)], axis=1), jnp.asarray(radius))

    # What only mjx keeps. All of it is of the beginning of the last substep, or of its last stage
    # where the integrator has stages, as native MuJoCo leaves it too.

    def center_of_mass(self, physics: Any) -> Array:
        """Of the whole body in the world, [3] (m)."""
        return physics.subtree_com[1]

    def body_inertia(self, physics: Any) -> Array:
        """Of each body about the whole body's center of mass, MuJoCo's cinert, [bodies, 10]."""
        return physics._impl.cinert

    def body_velocity(self, physics: Any) -> Array:
        """Of each body at the whole body's center of mass, MuJoCo's cvel, [bodies, 6]."""
        return physics.cvel

    def motor_force(self, physics: Any) -> Array:
        """On each degree of freedom, [qvel] (N, N m)."""
        return physics.qfrc_actuator

    def scaled_system(self, mass: Array, inertia: Array, damping: Array, friction: Array) -> Any:
        """Returns the model with its parameters multiplied; what MuJoCo derives from them when it
        compiles a model stays as it was. Only mjx reads them all.

        Args:
            mass: [bodies], the world left out.
            inertia: [bodies, 3], about the principal axes.
            damping: [qvel].
            friction: [geoms, 3].
        """
        system = self._system
        return system.replace(
            body_mass=system.body_mass.at[1:].multiply(mass),
            body_inertia=system.body_inertia.at[1:].multiply(inertia),
            dof_damping=system.dof_damping * damping,
            geom_friction=system.geom_friction * friction,
        )


def _load(backend: str, model: str, engine: Engine) -> tuple[Any, Any]:
    """Returns Brax's pipeline module of a backend and the System of a model."""
    # Importing MJX prints a notice when warp is missing; loading warns of Brax's state of
    # maintenance and of old attributes in its models. None of it is news to a user of JMQL.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mjcf = importlib.import_module("brax.io.mjcf")
        importlib.import_module("mujoco").set_mju_user_warning(lambda message: None)
        pipeline = importlib.import_module(f"brax.{backend}.pipeline")
        if backend == "mjx":
            system = _gymnasium_system(model, engine)
        else:
            system = mjcf.load(_package("brax") / "envs/assets" / model)
    system = system.tree_replace({"opt.timestep": engine.timestep})
    if engine.gear:
        gear = jnp.asarray(np.asarray(engine.gear), system.actuator.gear.dtype)
        system = system.replace(actuator=system.actuator.replace(gear=gear))
    return pipeline, system


def _gymnasium_system(model: str, engine: Engine) -> Any:
    """Returns the System of one of Gymnasium's models, for mjx only."""
    mujoco = importlib.import_module("mujoco")
    path = _package("gymnasium") / "envs/mujoco/assets" / model
    native = mujoco.MjModel.from_xml_path(str(path))
    native.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # humanoid asks for PGS, which MJX lacks
    # Of MuJoCo's 50 most would do nothing, and MJX runs them all: this is 4 to 6 times faster, and
    # as near to native MuJoCo. Fewer solver iterations are not: walker then errs by 5e-3.
    native.opt.ls_iterations = 4
    native.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    if engine.runge_kutta:
        native.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    # Not mjcf.load: it joins bodies without a joint to their parents, and humanoid shows its feet.
    system = importlib.import_module("brax.io.mjcf").load_model(native)
    # Gymnasium begins at qpos0; Brax would read a number `init_qpos` that ant's model has.
    return system.replace(init_q=jnp.asarray(native.qpos0))


def _package(name: str) -> pathlib.Path:
    """Returns the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return pathlib.Path(spec.origin).parent


def _one_step(pipeline: Any, system: Any, physics: Any, control: Array) -> Any:
    """Returns the physics one time step later, by the engine's own integrator."""
    return pipeline.step(system, physics, control)


def _runge_kutta(pipeline: Any, system: Any, physics: Any, control: Array) -> Any:
    """Returns the physics one time step later, by MuJoCo's Runge-Kutta of order 4.

    MJX has it too, but compiles the forces once for each stage; here the stages are a loop. The
    system's own integrator is Euler with explicit damping: of its steps only the forces are kept,
    and the way it moves positions, quaternions among them, at a given rate.
    """
    mjx = importlib.import_module("mujoco.mjx")
    first, timestep = physics, system.opt.timestep

    def moved(rate: Array) -> Array:
        return mjx.euler(system, first.replace(qvel=rate, qacc=jnp.zeros_like(rate))).qpos

    def stage(carry: Any, numbers: Array) -> tuple[Any, None]:
        physics, rate, acceleration = carry
        weight, ahead = numbers
        velocity = physics.qvel
        physics = pipeline.step(system, physics, control)
        rate = rate + weight * velocity
        acceleration = acceleration + weight * physics.qacc
        physics = physics.replace(
            qpos=moved(ahead * velocity), qvel=first.qvel + timestep * ahead * physics.qacc
        )
        return (physics, rate, acceleration), None

    none = jnp.zeros_like(first.qvel)
    numbers = jnp.array([[1 / 6, 1 / 2], [1 / 3, 1 / 2], [1 / 3, 1.0], [1 / 6, 0.0]])
    (physics, rate, acceleration), _ = jax.lax.scan(stage, (first, none, none), numbers)
    q, qd = moved(rate), first.qvel + timestep * acceleration
    return physics.replace(q=q, qd=qd, qpos=q, qvel=qd, time=first.time + timestep)


def _drop_forces(physics: Any) -> Any:
    """Returns a first state of mjx with zeros for all that a step computes anew.

    The compiler then leaves the forces out of a reset: contacts and their solver take two thirds
    of the time to compile one and nearly all of the time to run it, and training resets each row
    at each step, to have the fresh state where an episode has ended.
    """
    zeros = jax.tree.map(jnp.zeros_like, physics)
    kept = ("q", "qd", "qpos", "qvel", "x", "xd", "subtree_com", "cvel")
    return zeros.replace(
        _impl=zeros._impl.replace(cinert=physics._impl.cinert),
        **{name: getattr(physics, name) for name in kept},
    )
