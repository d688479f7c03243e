"""The bound of the benchmark, and its guard."""

import jax
import jax.numpy as jnp
import pytest

from experiments import bench, products
from experiments.config import RunFailed


def test_products_are_counted_in_loops_conditions_and_gradients():
    x, weights = jnp.ones((3, 4)), jnp.ones((4, 5))

    def function(x, weights):
        def step(x, _):
            return jnp.tanh(x @ weights @ weights.T), None

        x, _ = jax.lax.scan(step, x, None, length=6)
        x = jax.lax.cond(x[0, 0] > 0, lambda x: 2 * (x @ weights), lambda x: x @ weights, x)
        return jax.jit(jnp.sum)(x)

    rows = (((1,), (0,)), ((), ()))
    found = products.count(function, x, weights, branch=0.25)
    assert found == {((3, 4), (4, 5), rows): 6.25, ((3, 5), (5, 4), rows): 6.0}
    with_gradient = products.count(jax.grad(function, 1), x, weights, branch=0.25)
    assert sum(with_gradient.values()) == 3 * 12.25 - 0.25  # for nobody asks for the value
    assert products.compute(found, 4, jax.random.key(0)) == 0


def test_a_learner_that_lost_a_third_of_its_speed_is_refused():
    def row(share, **changed):
        return {"what": "cheetah_dir", "devices": 2, "of_bound": share} | changed

    before = [row(0.75), {"what": "ant_dir spring", "size": "quick"}]
    bench.refuse_slower([row(0.51)], before)
    bench.refuse_slower([row(0.1, what="new"), row(0.1, devices=4)], before)
    with pytest.raises(RunFailed, match=r"cheetah_dir on 2 runs at 49% .* it was 75%"):
        bench.refuse_slower([row(0.49)], before)
