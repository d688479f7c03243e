"""Time steps of bodies: of Brax's engines, and of MJX with rows and a solver of our own."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs import newton, rows
from envs.base import Array

Move = Callable[[Any, Any, Array, int], Any]  # system, physics, control, how many steps


def of_engine(pipeline: Any) -> Move:
    """Returns time steps of one of Brax's own engines."""

    def move(system: Any, physics: Any, control: Array, steps: int) -> Any:
        def step(physics: Any, _: None) -> tuple[Any, None]:
            return pipeline.step(system, physics, control), None

        return jax.lax.scan(step, physics, None, length=steps)[0]

    return move


def of_mjx(integrate: Callable[[Any, Any], Any]) -> Move:
    """Returns time steps of MJX by an integrator.

    Links are where the last step, or its last stage, began, as Brax has them. `contact` stays as it
    was; contacts are in `_impl`.
    """

    def move(system: Any, physics: Any, control: Array, steps: int) -> Any:
        def step(physics: Any, _: None) -> tuple[Any, None]:
            return integrate(system, physics), None

        physics = jax.lax.scan(step, physics.replace(ctrl=control), None, length=steps)[0]
        base = importlib.import_module("brax.base")
        x = base.Transform(pos=physics.xpos[1:], rot=physics.xquat[1:])
        offset = x.pos - physics.subtree_com[system.body_rootid[1:]]
        velocity = base.Motion(vel=physics.cvel[1:, 3:], ang=physics.cvel[1:, :3])
        xd = base.Transform.create(pos=offset).vmap().do(velocity)
        return physics.replace(q=physics.qpos, qd=physics.qvel, x=x, xd=xd)

    return move


# What `mjx.fwd_position` does before constraints, but for a factor of the inertia.
_PLACES = (
    "kinematics",
    "com_pos",
    "camlight",
    "tendon",
    "crb",
    "tendon_armature",
    "collision",
    "transmission",
)


def forces(system: Any, physics: Any) -> Any:
    """Returns what MJX computes of a state, its acceleration above all, as `mjx.forward` does, but
    with constraint forces of our own solver where it can find them.

    Then `qacc_smooth`, factors of the inertia and, but for `efc_force`, rows of constraints are not
    computed: they stay as they were.
    """
    mjx = importlib.import_module("mujoco.mjx")
    if not (physics._impl.nefc and solves(system)):
        return mjx.forward(system, physics)
    for part in _PLACES:
        physics = getattr(mjx, part)(system, physics)
    physics = mjx.sensor_vel(system, mjx.fwd_velocity(system, mjx.sensor_pos(system, physics)))
    physics = mjx.fwd_actuation(system, physics)
    force = physics.qfrc_passive - physics.qfrc_bias + physics.qfrc_actuator
    force = force + physics.qfrc_applied + _pushed(system, physics)
    physics = _solved(system, physics.replace(qfrc_smooth=force))
    return mjx.sensor_acc(system, physics)


def _pushed(system: Any, physics: Any) -> Array:
    """Returns what `xfrc_applied` does to each degree of freedom [V], as `mjx.xfrc_accumulate`
    does, which walks over the tree for each body.
    """
    force, torque = jnp.split(physics.xfrc_applied, 2, axis=-1)
    arm = physics.xipos - physics.subtree_com[system.body_rootid]
    wrench = jnp.concatenate([torque + jnp.cross(arm, force), force], axis=-1)  # [bodies, 6]
    return (physics.cdof * (rows.moves(system).T.astype(force.dtype) @ wrench)).sum(-1)


def solves(system: Any) -> bool:
    """Returns whether what constraints cost is `newton.Cost` in a model of MJX: its friction cones
    are pyramids, and there is no friction in its joints and tendons.
    """
    pyramids = importlib.import_module("mujoco").mjtCone.mjCONE_PYRAMIDAL
    inner = system._impl.dof_hasfrictionloss.any() or system._impl.tendon_hasfrictionloss.any()
    return system.opt.cone == pyramids and not inner


def _solved(system: Any, physics: Any) -> Any:
    """Returns the physics with the acceleration and the forces of its constraints."""
    mjx = importlib.import_module("mujoco.mjx")
    if usual(system, physics._impl.contact.dim):
        found = rows.make(system, physics)
    else:
        of = mjx.make_constraint(system, physics)._impl
        found = rows.Rows(of.efc_J, of.efc_D, of.efc_aref)
    equality = jnp.arange(len(found.reference)) < physics._impl.ne
    mass = mjx.full_m(system, physics)
    cost = newton.Cost(mass, physics.qfrc_smooth, *found, equality)
    # As MJX scales costs.
    tolerance, start = system.opt.tolerance * jnp.trace(mass), physics.qacc_warmstart
    qacc = newton.minimum(cost, start, tolerance, system.opt.iterations).acceleration
    miss = cost.misses(qacc)
    force = -cost.held(miss) * miss
    return physics.tree_replace(
        {"qacc": qacc, "qfrc_constraint": force @ cost.jacobian, "_impl.efc_force": force}
    )


def usual(system: Any, dims: np.ndarray) -> bool:
    """Returns whether all constraints of a model of MJX with pyramids are among those of `rows`.

    Args:
        system: the model.
        dims: of its contacts.
    """
    mujoco = importlib.import_module("mujoco")
    flags, balls = mujoco.mjtDisableBit, system.jnt_type == int(mujoco.mjtJoint.mjJNT_BALL)
    off = flags.mjDSBL_CONSTRAINT | flags.mjDSBL_LIMIT | flags.mjDSBL_REFSAFE
    limits = (balls & system.jnt_limited.astype(bool)).any() or system.tendon_limited.any()
    others = system.opt.disableflags & off or limits or system.neq
    return set(dims) <= {1, 3} and not others


def euler(system: Any, physics: Any) -> Any:
    """Returns the physics one time step later, by MuJoCo's semi-implicit Euler."""
    return importlib.import_module("mujoco.mjx").euler(system, forces(system, physics))


def runge_kutta(system: Any, physics: Any) -> Any:
    """Returns the physics one time step later, by MuJoCo's Runge-Kutta of order 4.

    MJX has it too, but compiles the forces once for each stage; here the stages are a loop. The
    system's own integrator is Euler with explicit damping: of it only the way is used that it moves
    positions, quaternions among them, at a given rate.
    """
    mjx = importlib.import_module("mujoco.mjx")
    first, timestep = physics, system.opt.timestep

    def moved(rate: Array) -> Array:
        return mjx.euler(system, first.replace(qvel=rate, qacc=jnp.zeros_like(rate))).qpos

    def stage(carry: Any, numbers: Array) -> tuple[Any, None]:
        physics, rate, acceleration = carry
        weight, ahead = numbers
        velocity = physics.qvel
        physics = forces(system, physics)
        rate = rate + weight * velocity
        acceleration = acceleration + weight * physics.qacc
        physics = physics.replace(
            qpos=moved(ahead * velocity),
            qvel=first.qvel + timestep * ahead * physics.qacc,
            qacc_warmstart=physics.qacc,
        )
        return (physics, rate, acceleration), None

    none = jnp.zeros_like(first.qvel)
    numbers = jnp.array([[1 / 6, 1 / 2], [1 / 3, 1 / 2], [1 / 3, 1.0], [1 / 6, 0.0]])
    (physics, rate, acceleration), _ = jax.lax.scan(stage, (first, none, none), numbers)
    q, qd = moved(rate), first.qvel + timestep * acceleration
    return physics.replace(qpos=q, qvel=qd, time=first.time + timestep)


def without_forces(physics: Any) -> Any:
    """Returns a first state of mjx with zeros for all that a step computes anew.

    The compiler then leaves the forces out of a reset: contacts and their solver take two thirds
    of the time to compile one and nearly all of the time to run it, and training resets each row
    at each step, to have the fresh state where an episode has ended.
    """
    zeros = jax.tree.map(jnp.zeros_like, physics)
    kept = ("q", "qd", "qpos", "qvel", "x", "xd", "subtree_com", "cvel", "eq_active")
    return zeros.replace(
        _impl=zeros._impl.replace(cinert=physics._impl.cinert),
        **{name: getattr(physics, name) for name in kept},
    )
