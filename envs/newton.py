"""The forces of MuJoCo's constraints by Newton's method, in place of MJX's own solver.

The acceleration a [V] of a body is where a convex cost, quadratic in pieces, is smallest (MuJoCo's
documentation, "Computation", "Constraint solver"):

    1/2 a' M a - a' f + 1/2 sum over held rows of D r^2,   r = J a - a_ref

M is the inertia and f all other force, so that without rows M a = f. An equality's row is always
held, any other where r < 0. MJX finds the same minimum, but most of its time goes to a line search
of three points a step, and to a last step that finds nothing left to gain. Here Newton's method in
one dimension, within a bracket, searches a line, and the last step is known by itself: if it
changes no row the cost is quadratic on it, and it ends at the minimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.base import Array

_SEARCH = 4  # steps of the line search


class Cost(NamedTuple):
    """What is smallest at the acceleration that the constraints leave, see above."""

    mass: Array  # M [V, V]
    force: Array  # f [V], without constraints
    jacobian: Array  # J [C, V]
    stiffness: Array  # D [C]
    reference: Array  # a_ref [C]
    equality: Array  # [C] bool

    def misses(self, acceleration: Array) -> Array:
        """What rows miss, r [C]."""
        return self.jacobian @ acceleration - self.reference

    def held(self, miss: Array) -> Array:
        """The stiffness [C] of the rows that are held, 0 of the others."""
        return self.stiffness * (self.equality | (miss < 0))


class Minimum(NamedTuple):
    """Where the cost is smallest, and how it was found."""

    acceleration: Array  # [V]
    steps: Array  # [] int32
    done: Array  # [] bool; False: it took as many steps as it may


def minimum(cost: Cost, start: Array, tolerance: Array | float, iterations: int | Array) -> Minimum:
    """Returns where the cost is smallest.

    Args:
        cost: what is minimised.
        start: where to begin, [V].
        tolerance: a step that gains less is the last.
        iterations: the most steps.
    """

    def step(found: Minimum) -> Minimum:
        miss = cost.misses(found.acceleration)
        held = cost.held(miss)
        pull = cost.mass @ found.acceleration - cost.force
        gradient = pull + (held * miss) @ cost.jacobian
        hessian = cost.mass + (cost.jacobian.T * held[None]) @ cost.jacobian
        factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
        way = -jax.scipy.linalg.cho_solve(factor, gradient)
        change = cost.jacobian @ way
        exact = jnp.all(cost.held(miss + change) == held)
        far = _line_search(cost, miss, change, way @ pull, way @ cost.mass @ way)
        far = jnp.where(exact, 1.0, far)
        acceleration = found.acceleration + far * way
        # The cost is convex: it falls by no more than its slope here says.
        gain = -jnp.maximum(far, 1.0) * way @ gradient
        done = exact | ~(gain >= tolerance)  # also where it is not a number
        return Minimum(acceleration, found.steps + 1, done)

    def goes_on(found: Minimum) -> Array:
        return ~found.done & (found.steps < iterations)

    first = Minimum(start, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return jax.lax.while_loop(goes_on, step, first)


def _line_search(cost: Cost, miss: Array, change: Array, slope: Array, bend: Array) -> Array:
    """Returns how far [] along a way the cost is smallest.

    Args:
        cost: what is minimised.
        miss: r [C] at its beginning.
        change: of r [C] along the whole way.
        slope, bend: [], first derivative at the beginning and second of what does not depend on
            rows.
    """
    far, low, high = jnp.ones(()), jnp.zeros(()), jnp.full((), jnp.inf)
    for _ in range(_SEARCH):
        ahead = miss + far * change
        weight = cost.held(ahead) * change
        first, second = slope + far * bend + weight @ ahead, bend + weight @ change
        low, high = jnp.where(first < 0, far, low), jnp.where(first < 0, high, far)
        guess = far - first / second
        far = jnp.where((guess >= low) & (guess <= high), guess, 0.5 * (low + high))
    return far
