"""Strictness, for every test: ranks are never promoted, and there are several host devices.

Warnings are errors too, see `filterwarnings` in pyproject.toml.
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Before the first import of jax. What shards over devices must be seen to do so; and tests are
# compilation for the most part, which takes half the time without LLVM's optimisations, half of
# that without XLA's own fusion emitters, and a quarter less without passes that long runs need.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_disable_hlo_passes=simplify-while-loops,while-loop-invariant-code-motion,"
        "while-loop-constant-sinking,simplify-conditional,tree_reduction_rewriter,reshape-mover,"
        "simplify-sorts",
    ]
)
# And what one test, one worker or the run before has compiled is not compiled again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(".pytest_cache/xla").resolve()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, so that a red test is red for everyone; the first example of a
# shape compiles, so time says nothing.
hypothesis.settings.register_profile("jmql", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("jmql")


# What `make check` leaves out: whole runs, physics, and programs that take long to compile.
SLOW = {
    f"tests.test_{name}"
    for name in (
        "adapt checkpoint door envs evaluate families figures hosts mesh mirror outside p3o"
        " p3o_runs parity policy population probes resume rows studies tracking train"
    ).split()
}


# A worker takes a file at a time: the longest first, so that none is left alone with one.
LONGEST = (
    "resume parity p3o cli sweep hosts p3o_runs envs population mirror mesh train adapt evaluate"
    " outside probes door"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files, and marks the slow tests."""
    turn = {f"tests.test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turn.get(item.module.__name__, len(turn)))
    for item in items:
        name = item.module.__name__
        if name in SLOW or "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def rank_promotion() -> Iterator[None]:
    """Allows rank promotion, for tests that run the physics of Brax: it adds [3] to [N, 3]."""
    with jax.numpy_rank_promotion("allow"):
        yield
