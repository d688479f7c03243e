"""What moving bodies share: speed, headings, and the cost of control."""

from typing import Any

import jax.numpy as jnp

from envs.base import Array
from envs.physics import Body


def speed(body: Body, before: Any, after: Any) -> Array:
    """Returns the mean speed along x over a control step (m/s)."""
    return (body.position(after)[0] - body.position(before)[0]) / body.dt


def control_cost(action: Array, weight: float) -> Array:
    """Returns weight * sum a^2."""
    return weight * jnp.sum(jnp.square(action))


def heading(angle: Array) -> Array:
    """Returns the unit vector [2] at an angle from the x axis (rad)."""
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def side(sign: Any) -> str:
    """Returns what a direction along x is called, by its sign."""
    return "forward" if sign > 0 else "backward"
