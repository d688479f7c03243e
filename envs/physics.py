"""Bodies and their models: with `steps` alone in `envs` it imports brax, mujoco or gymnasium.

A family sees its physics through the methods of `Body`, and is written once for every backend. An
engine is imported when a body is made, so that a family can be read without.
"""

import abc
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs import steps
from envs.base import Array, Environment, Task


class Shapes(NamedTuple):
    """What a body is made of, in the world, for pictures."""

    ends: Array  # [G, 2, 3] of capsules: the two ends of each one's axis, equal for a sphere (m)
    radius: Array  # [G] of capsules (m)
    corners: Array  # [N, 8, 3] of boxes (m)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How one backend runs one body: physics steps, their length, and what the model is not."""

    timestep: float  # seconds
    substeps: int  # physics steps in a control step
    gear: tuple[float, ...] = ()  # of the motors; empty: as in the model
    runge_kutta: bool = False  # mjx: by MuJoCo's Runge-Kutta of order 4, else by its Euler
    # mjx: the most contacts at a time that have friction, and that have none. Where there are more
    # the deepest count. Each costs its forces at every step, whether it touches or not; 0: all.
    contacts: int = 0


class Body(Environment):
    """A family whose body is a MuJoCo model. Its backends are those that it has an `Engine` for."""

    reset_noise = 0.1  # largest distance of a first position from rest (m, rad)
    normal_velocity = True  # first velocities are reset_noise * N(0, 1), or drawn as positions are

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.engines, Mapping):
            cls.backends = tuple(cls.engines)

    def __init__(self, backend: str, **kwargs: Any):
        super().__init__(**kwargs)
        engine = self.engines[backend]
        self._substeps = engine.substeps
        self._pipeline, self._system = _load(backend, self.model, engine)
        self._finish_reset = steps.without_forces if backend == "mjx" else lambda physics: physics
        self._move = steps.of_engine(self._pipeline)
        if backend == "mjx":
            if engine.runge_kutta and self._system.na:
                raise ValueError(f"{self.model}: actuators with a state need runge_kutta=False")
            self._move = steps.of_mjx(steps.runge_kutta if engine.runge_kutta else steps.euler)
        self.dt = engine.timestep * engine.substeps  # seconds of a control step
        free = np.asarray(self._system.jnt_type) == 0  # mujoco.mjtJoint.mjJNT_FREE
        # Where the orientations of free joints, unit quaternions, begin among the positions.
        self._quaternions = [int(q) + 3 for q in np.asarray(self._system.jnt_qposadr)[free]]

    @property
    @abc.abstractmethod
    def model(self) -> str | Path:
        """A class attribute: a file of the project, or the name of a model that Gymnasium has, for
        mjx, and Brax, for its own engines.
        """

    @property
    @abc.abstractmethod
    def engines(self) -> Mapping[str, Engine]:
        """A class attribute: what runs the body on each backend, the default first."""

    @property
    def action_size(self) -> int:
        """A, the number of motors."""
        return self._system.act_size()

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
        for i in self._quaternions:
            q = q.at[i : i + 4].divide(jnp.linalg.norm(q[i : i + 4]))
        shape = (system.qd_size(),)
        if self.normal_velocity:
            qd = noise * jax.random.normal(velocity_key, shape)
        else:
            qd = jax.random.uniform(velocity_key, shape, minval=-noise, maxval=noise)
        return self.placed(task, q, qd)

    def placed(self, task: Task, q: Array, qd: Array) -> Any:
        """Returns the physics at positions and velocities, with which an episode begins."""
        with _all_bits():
            return self._finish_reset(self._pipeline.init(self.system(task), q, qd))

    def advance(self, physics: Any, action: Array, task: Task) -> Any:
        """Maps the action to the motors' range, and drives them."""
        return self.driven(physics, self.control(action), task)

    def driven(self, physics: Any, control: Array, task: Task) -> Any:
        """Returns the physics one control step later; control [actuators] is held all the time."""
        with _all_bits():
            return self._move(self.system(task), physics, control, self._substeps)

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

    def shapes(self, physics: Any, task: Task) -> Shapes:
        """The capsules, spheres and boxes of a task's model, where they are."""
        rotate = jax.vmap(importlib.import_module("brax.math").rotate)
        kinds = importlib.import_module("mujoco").mjtGeom
        system = self.system(task)
        # A geom's body counts from the world, which no link is.
        position = jnp.concatenate([jnp.zeros((1, 3)), physics.x.pos])
        rotation = jnp.concatenate([jnp.array([[1.0, 0.0, 0.0, 0.0]]), physics.x.rot])

        def of_kind(*kinds: int) -> np.ndarray:
            return np.flatnonzero(np.isin(system.geom_type, kinds))

        def placed(geoms: np.ndarray, local: Array) -> Array:
            """Points of geoms [G, 3], in the world."""
            body = system.geom_bodyid[geoms]
            local = rotate(local, system.geom_quat[geoms]) + system.geom_pos[geoms]
            return position[body] + rotate(local, rotation[body])

        rods, boxes = of_kind(kinds.mjGEOM_SPHERE, kinds.mjGEOM_CAPSULE), of_kind(kinds.mjGEOM_BOX)
        axis = system.geom_size[rods, 1:2] * jnp.array([[0.0, 0.0, 1.0]])
        ends = [placed(rods, sign * axis) for sign in (-1.0, 1.0)]
        signs = itertools.product((-1.0, 1.0), repeat=3)
        corners = [placed(boxes, system.geom_size[boxes] * jnp.array([sign])) for sign in signs]
        radius = jnp.asarray(system.geom_size[rods, 0])
        return Shapes(jnp.stack(ends, axis=1), radius, jnp.stack(corners, axis=1))

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

    def rebuilt_system(
        self,
        body: str,
        size: Array,
        place: Array,
        friction: Array,
        mass: Array,
        inertia: Array,
        center: Array,
    ) -> Any:
        """Returns the model with one body rebuilt, for mjx.

        Of what MuJoCo derives when it compiles a model only the inverse weight that contacts of
        three dimensions read follows: the body may have no limits, no friction in its joints, and
        no equality.

        Args:
            body: its name.
            size: [G, 3] of its geoms, by type as MuJoCo has them (m).
            place: [G, 3] of their centers, in the body's frame (m).
            friction: [] of its geoms, sliding.
            mass: [] (kg).
            inertia: [3], about axes through the center of mass, parallel to the body's (kg m^2).
            center: [3], of mass, in the body's frame (m).
        """
        system = self._system
        index = system.mj_model.body(body).id
        geoms = np.flatnonzero(np.asarray(system.geom_bodyid) == index)
        lighter = system.mj_model.body_mass[index] / mass
        return system.replace(
            geom_size=system.geom_size.at[geoms].set(size),
            geom_pos=system.geom_pos.at[geoms].set(place),
            geom_friction=system.geom_friction.at[geoms, 0].set(friction),
            body_mass=system.body_mass.at[index].set(mass),
            body_inertia=system.body_inertia.at[index].set(inertia),
            body_ipos=system.body_ipos.at[index].set(center),
            body_iquat=system.body_iquat.at[index].set(jnp.array([1.0, 0.0, 0.0, 0.0])),
            body_invweight0=system.body_invweight0.at[index, 0].multiply(lighter),
        )

    def gap(self, physics: Any, geom: str, body: str) -> Array:
        """Returns the distance between a geom and the nearest of a body that it can touch, [] (m).

        It is of the beginning of the last substep, and infinite at the beginning of an episode.
        """
        model, contact = self._system.mj_model, physics._impl.contact
        mine = (contact.geom == model.geom(geom).id).any(axis=-1)
        other = (jnp.asarray(self._system.geom_bodyid)[contact.geom] == model.body(body).id).any(-1)
        return jnp.where(mine & other, contact.dist, jnp.inf).min()

    def command(self, physics: Any) -> Array:
        """Returns what the actuators were last told, [actuators], 0 at the beginning."""
        return physics.ctrl


def _all_bits() -> Any:
    """Returns a context in which GPUs and TPUs multiply float32 with all of its bits: by default
    they do with fewer.
    """
    return jax.default_matmul_precision("highest")


def _load(backend: str, model: str | Path, engine: Engine) -> tuple[Any, Any]:
    """Returns Brax's pipeline module of a backend and the System of a model."""
    # Importing MJX prints a notice when warp is missing; loading warns of Brax's state of
    # maintenance and of old attributes in its models. None of it is news to a user of JMQL.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mjcf = importlib.import_module("brax.io.mjcf")
        importlib.import_module("mujoco").set_mju_user_warning(lambda message: None)
        pipeline = importlib.import_module(f"brax.{backend}.pipeline")
        path = model if isinstance(model, Path) else _borrowed(backend, model)
        system = _mjx_system(path, engine) if backend == "mjx" else mjcf.load(path)
    system = system.tree_replace({"opt.timestep": engine.timestep})
    if engine.gear:
        gear = jnp.asarray(np.asarray(engine.gear), system.actuator.gear.dtype)
        system = system.replace(actuator=system.actuator.replace(gear=gear))
    return pipeline, system


def _mjx_system(path: Path, engine: Engine) -> Any:
    """Returns the System of a model, for mjx only."""
    mujoco = importlib.import_module("mujoco")
    source = mujoco.MjSpec.from_file(str(path))
    # A model's custom numbers are for other engines, and MJX finds only a first one.
    for numeric in list(source.numerics):
        source.delete(numeric)
    if engine.contacts:
        source.add_numeric(name="max_contact_points", size=1, data=[engine.contacts])
    native = source.compile()
    native.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # humanoid asks for PGS, which MJX lacks
    # Of MJX's own solver, for models that ours does not solve: it runs all of MuJoCo's 50, of which
    # most would do nothing.
    native.opt.ls_iterations = 4
    native.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    if engine.runge_kutta:
        native.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_EULERDAMP
    # Not mjcf.load: it joins bodies without a joint to their parents, and humanoid shows its feet.
    return importlib.import_module("brax.io.mjcf").load_model(native)


def _borrowed(backend: str, model: str) -> Path:
    """Returns the file of a model of Gymnasium's, or of Brax's, without importing them."""
    if backend == "mjx":
        package, folder = "gymnasium", "envs/mujoco/assets"
    else:
        package, folder = "brax", "envs/assets"
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / folder / model
