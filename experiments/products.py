"""The matrix products of a computation by themselves: what the rest of it is measured against."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from jmql.types import Array, Key

# Shapes of both sides, and which of their axes are summed and which are batches.
Product = tuple[tuple[int, ...], tuple[int, ...], Any]


def count(function: Callable[..., Any], *args: Any, branch: float) -> dict[Product, float]:
    """Returns how many times each product is computed, as the program is written, but for those
    that nothing asks for.

    Loops of no fixed length count once, and of a condition the branches where it is true.

    Args:
        function, args: what is traced; arrays may be shapes.
        branch: how often conditions are true.
    """
    found: dict[Product, float] = {}

    def add(equation: Any, times: float) -> None:
        if equation.primitive.name == "dot_general":
            left, right = (x.aval.shape for x in equation.invars)
            product = left, right, equation.params["dimension_numbers"]
            found[product] = found.get(product, 0.0) + times
        elif equation.primitive.name == "cond":
            within(equation.params["branches"][1], times * branch)
        else:
            times *= equation.params["length"] if equation.primitive.name == "scan" else 1
            for inner in equation.params.values():
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    within(inner, times)

    def within(code: ClosedJaxpr | Jaxpr, times: float) -> None:
        code = code.jaxpr if isinstance(code, ClosedJaxpr) else code
        for equation in dce_jaxpr(code, [True] * len(code.outvars))[0].eqns:
            add(equation, times)

    within(jax.make_jaxpr(function)(*args), 1.0)
    return found


def compute(products: Mapping[Product, float], repeats: int, key: Key) -> Array:
    """Computes products, each as often as is counted, `repeats` times, one after the other.

    Returns:
        0, which depends on all of them.
    """
    zero = jnp.zeros(())
    for (left, right, dimensions), times in products.items():
        a, b = jax.random.normal(key, left), jax.random.normal(key, right)

        def once(_: int, zero: Array, a: Array = a, b: Array = b, how: Any = dimensions) -> Array:
            return 0 * jnp.max(jax.lax.dot_general(a + zero, b, how))

        zero = jax.lax.fori_loop(0, round(repeats * times), once, zero)
    return zero
