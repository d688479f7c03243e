"""The solver of constraints, on random ones: parity with native MuJoCo is tested with physics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import newton

SIZE, ROWS, EQUALITIES = 6, 15, 2


def constraints(seed, stiff):
    random = np.random.default_rng(seed)
    root = random.normal(size=(SIZE, SIZE))
    return newton.Cost(
        mass=jnp.asarray(root @ root.T + 0.1 * np.eye(SIZE)),
        force=jnp.asarray(10 * random.normal(size=SIZE)),
        jacobian=jnp.asarray(random.normal(size=(ROWS, SIZE))),
        stiffness=jnp.asarray(stiff * np.exp(random.normal(size=ROWS))),
        reference=jnp.asarray(10 * random.normal(size=ROWS)),
        equality=jnp.arange(ROWS) < EQUALITIES,
    )


def price(cost, acceleration):
    miss = cost.misses(acceleration)
    rows = 0.5 * cost.held(miss) @ jnp.square(miss)
    return 0.5 * acceleration @ cost.mass @ acceleration - acceleration @ cost.force + rows


@pytest.mark.parametrize("stiff", [1.0, 1000.0])
def test_at_the_minimum_the_cost_is_level(stiff):
    with jax.enable_x64(True):
        costs = [constraints(seed, stiff) for seed in range(50)]
        many = jax.tree.map(lambda *x: jnp.stack(x), *costs)

        def level(cost):
            found = newton.minimum(cost, jnp.zeros_like(cost.force), 1e-12, 100)
            return jax.grad(price, argnums=1)(cost, found.acceleration), found

        slope, found = jax.jit(jax.vmap(level))(many)
        np.testing.assert_allclose(slope, 0, atol=1e-9 * stiff)
        assert found.done.all()
        assert found.steps.max() <= 10


def test_rows_hold_and_push_but_never_pull():
    mass, zero = jnp.eye(1), jnp.zeros(1)
    held = newton.Cost(mass, zero, jnp.ones((1, 1)), jnp.ones(1), jnp.ones(1), zero > 0)
    for cost, expected in (
        (held, 0.5),  # half way to where the row wants it, for it is as stiff as the mass
        (held._replace(reference=-jnp.ones(1)), 0.0),
        (held._replace(reference=-jnp.ones(1), equality=zero == 0), -0.5),
    ):
        np.testing.assert_allclose(newton.minimum(cost, zero, 0.0, 10)[0], [expected], atol=1e-6)


def test_it_stops_after_as_many_steps_as_it_may():
    cost = constraints(0, 1000.0)
    found = newton.minimum(cost, jnp.zeros_like(cost.force), 0.0, 1)
    assert (found.steps, found.done) == (1, False)


def test_what_is_not_finite_does_not_keep_others_waiting():
    cost = constraints(0, 1000.0)
    for broken in (
        cost._replace(stiffness=cost.stiffness * jnp.nan),
        cost._replace(mass=-cost.mass),
    ):
        assert newton.minimum(broken, jnp.zeros_like(cost.force), 0.0, 100).steps <= 4


def test_single_precision_comes_to_an_end():
    costs = jax.tree.map(lambda *x: jnp.stack(x), *(constraints(i, 1000.0) for i in range(200)))
    found = jax.vmap(lambda cost: newton.minimum(cost, jnp.zeros_like(cost.force), 0.0, 100))(costs)
    assert found.done.all()
    assert found.steps.max() <= 20
