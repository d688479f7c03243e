"""Rows of MuJoCo's constraints: limits of hinges and slides, and contacts with pyramids for cones.

MJX has them and all others (`mjx.make_constraint`), but finds by a walk over the tree, for each
contact, which joints move it, and computes what is of a contact once for each of the four sides of
its pyramid.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from envs.base import Array

_LEAST = 1e-15  # mjMINVAL
_IMPEDANCES = 1e-4, 0.9999  # mjMINIMP, mjMAXIMP


class Rows(NamedTuple):
    """What `newton.Cost` asks of constraints."""

    jacobian: Array  # J [C, V]
    stiffness: Array  # D [C]
    reference: Array  # a_ref [C]


def make(system: Any, physics: Any) -> Rows:
    """Returns the rows of a state of MJX whose contacts are found, in MuJoCo's order.

    A row that does not act has zeros for J and a_ref. What a model has beyond these kinds is not
    counted: equalities, limits of balls and tendons, friction of joints, contacts of other
    dimensions than 1 and 3, and MuJoCo's flags that disable limits or `refsafe`.
    """
    dims = physics._impl.contact.dim
    parts = [_limits(system, physics)]
    parts += [_contacts(system, physics, dim) for dim in (1, 3) if (dims == dim).any()]
    return Rows(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))


def _limits(system: Any, physics: Any) -> Rows:
    joints = np.flatnonzero(system.jnt_limited)
    dofs = system.jnt_dofadr[joints]
    place = physics.qpos[system.jnt_qposadr[joints]]
    low, high = system.jnt_range[joints].T
    sign = jnp.where(place - low < high - place, 1.0, -1.0)
    gap = jnp.minimum(place - low, high - place) - system.jnt_margin[joints]
    jacobian = jnp.where(gap < 0, sign, 0.0)[:, None] * np.eye(system.nv)[dofs]
    weight = system.dof_invweight0[dofs]
    parameters = system.jnt_solref[joints], system.jnt_solimp[joints]
    return _sprung(system, physics, jacobian[:, None], gap, weight, *parameters)


def _contacts(system: Any, physics: Any, dim: int) -> Rows:
    found = physics._impl.contact
    (places,) = np.nonzero(found.dim == dim)
    bodies = jnp.asarray(system.geom_bodyid)[found.geom[places]]
    gap = found.dist[places] - found.includemargin[places]
    frame, friction = found.frame[places], found.friction[places]
    axes = _along(system, physics, bodies, found.pos[places], frame) * (gap < 0)[:, None, None]
    weight = system.body_invweight0[:, 0][bodies].sum(-1)
    if dim == 3:
        slid = axes[:, 1:] * friction[:, :2, None]
        sides = jnp.stack([slid, -slid], axis=2).reshape(len(places), 4, -1)
        jacobian, slip = axes[:, :1] + sides, jnp.square(friction[:, 0])
        weight = weight * (1 + slip) * 2 * slip / system.opt.impratio
    else:
        jacobian = axes[:, :1]
    parameters = found.solref[places], found.solimp[places]
    return _sprung(system, physics, jacobian, gap, weight, *parameters)


def _along(system: Any, physics: Any, bodies: Array, point: Array, frame: Array) -> Array:
    """Returns how fast velocities part two bodies in a point along the axes of a frame [N, 3, V].

    Args:
        system, physics: of MJX.
        bodies: [N, 2].
        point: [N, 3] (m).
        frame: [N, 3, 3], its axes are rows.
    """
    moved = jnp.asarray(moves(system), point.dtype)
    side = moved[bodies[:, 1]] - moved[bodies[:, 0]]  # [N, V]
    center = physics.subtree_com[system.body_rootid[system.dof_bodyid]]
    arm = point[:, None] - center[None]  # [N, V, 3]
    turning, going = jnp.split(physics.cdof, 2, axis=-1)
    velocity = side[..., None] * (going[None] + jnp.cross(turning[None], arm))
    # Not a matrix product for each contact: on CPU many small ones are slow.
    x, y, z = (frame[:, :, None, i] * velocity[:, None, :, i] for i in range(3))
    return x + y + z


def moves(system: Any) -> np.ndarray:
    """Returns which degrees of freedom move which bodies, [bodies, V] bool."""
    found = np.zeros((system.nbody, system.nv), bool)
    for body in range(1, system.nbody):
        found[body] = found[system.body_parentid[body]] | (np.asarray(system.dof_bodyid) == body)
    return found


def _sprung(
    system: Any,
    physics: Any,
    jacobian: Array,
    gap: Array,
    weight: Array,
    solref: Array,
    solimp: Array,
) -> Rows:
    """Returns the rows of constraints that hold like springs with dampers (MuJoCo's documentation,
    "Solver parameters").

    Args:
        system, physics: of MJX.
        jacobian: [N, R, V] of the rows of each.
        gap: [N], to where each begins to act; below 0 it acts (m, rad).
        weight: [N], inverse.
        solref: [N, 2].
        solimp: [N, 5].
    """
    least, most, width, middle, power = solimp.T
    least, most, middle = (jnp.clip(x, *_IMPEDANCES) for x in (least, most, middle))
    deep = jnp.minimum(1.0, jnp.abs(gap) / jnp.maximum(_LEAST, width))
    first = deep < middle
    part = jnp.where(first, deep / middle, (1 - deep) / (1 - middle)) ** jnp.maximum(1.0, power)
    rise = jnp.where(first, middle * part, 1 - (1 - middle) * part)
    impedance = least + rise * (most - least)
    # Where not above 0, what the spring and the damper are, but for their sign.
    given, ratio = solref.T
    time = jnp.maximum(given, 2 * system.opt.timestep)
    spring = jnp.where(given > 0, 1 / jnp.square(most * time * ratio), -given / jnp.square(most))
    damper = jnp.where(ratio > 0, 2 / (most * time), -ratio / most)
    pull = -spring * impedance * jnp.minimum(gap, 0.0)
    reference = pull[:, None] - damper[:, None] * (jacobian @ physics.qvel)
    soft = jnp.maximum(_LEAST, weight * (1 - impedance) / impedance)
    stiffness = jnp.broadcast_to(1 / soft[:, None], reference.shape)
    return Rows(jacobian.reshape(-1, system.nv), stiffness.reshape(-1), reference.reshape(-1))
