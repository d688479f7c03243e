"""Which devices share the work of a run."""

import importlib.util
import math
import os
from typing import Any

import jax
import psutil
from jax.interpreters import mlir

from experiments import hosts
from experiments.config import RunConfig
from experiments.memory import CGROUPS
from jmql import mesh, replay
from jmql.settings import ConfigError

SEEDS = "seeds"  # the other axis: seeds have nothing to say to each other
_SHARE = 32  # of a batch; a smaller one is not worth a device by itself
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")
_HOST = "--xla_force_host_platform_device_count"


def prepare(wanted: int) -> None:
    """Makes devices of cores, before JAX starts; what XLA_FLAGS says already is kept.

    Args:
        wanted: how many.
    """
    wanted = min(wanted, os.cpu_count() or 1)
    flags = {
        _HOST: wanted,
        # Else each would take all cores for its matrix products.
        "--xla_cpu_multi_thread_eigen": "false",
        # XLA ends the process where a device is 60 s late, as on a machine that others use, too.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 86400,
        "--xla_cpu_collective_call_terminate_timeout_seconds": 7 * 86400,
    }
    said = os.environ.get("XLA_FLAGS", "")
    if wanted > 1 or _HOST in said:
        new = [f"{name}={value}" for name, value in flags.items() if name not in said]
        os.environ["XLA_FLAGS"] = " ".join([said, *new]).strip()
        factorise_one_by_one()


def factorise_one_by_one() -> None:
    """Makes Cholesky factorisations of many matrices on CPU one call each, with the same bits.

    JAX 0.10 divides one call over the threads of XLA's pool and waits for them, itself on a thread
    of that pool: with one for each core and a device on each, all of them wait forever.
    """
    if jax.__version_info__ >= (0, 11):
        return
    from jax._src.lax import linalg

    def lower(context: Any, matrices: Any) -> Any:
        (shape,) = (aval.shape for aval in context.avals_in)
        if len(shape) == 2:
            return linalg._cholesky_cpu_lowering(context, matrices)
        return each(context, matrices)

    def factors(matrices: jax.Array) -> jax.Array:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        return jax.lax.map(jax.lax.linalg.cholesky_p.bind, flat).reshape(matrices.shape)

    each = mlir.lower_fun(factors, multiple_results=False)
    mlir.register_lowering(jax.lax.linalg.cholesky_p, lower, platform="cpu")


def accelerated() -> bool:
    """Returns whether JAX is installed for GPUs or a TPU here; it is not started for that."""
    return any(importlib.util.find_spec(name) for name in _PLUGINS)


def cores() -> int:
    """Returns how many cores this process may keep busy."""
    counts = [os.cpu_count() or 1, psutil.cpu_count(logical=False) or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    for files in _QUOTAS:
        try:
            quota, period = " ".join((CGROUPS / name).read_text() for name in files).split()
            if int(quota) > 0:
                counts.append(max(1, int(quota) // int(period)))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(counts)


def count(config: RunConfig, there: int) -> int:
    """Returns how many of the devices that are there a run uses, if they can share it equally.

    By default they are as many as get 32 samples of a batch each.
    """
    if config.devices:
        return config.devices
    steps = config.collect.unroll if config.algorithm == "p3o" else 1  # of each draw
    most = max(1, config.batch[1] * steps // _SHARE)
    return max(n for n in valid(config, there) if _sharers(config, n) <= most)


def valid(config: RunConfig, there: int) -> list[int]:
    """Returns the numbers of devices that can share a run equally."""
    blocks = replay.strata(config.collect.rows, config.batch[1])
    return [n for n in range(1, there + 1) if blocks % _sharers(config, n) == 0]


def _sharers(config: RunConfig, count: int) -> int:
    """Returns how many of the devices share a seed."""
    return count // math.gcd(count, config.seeds)


def choose(config: RunConfig) -> jax.sharding.Mesh:
    """Returns the devices of a run, [seeds, rows].

    Raises:
        ConfigError: there are not so many, or they cannot have equal shares.
    """
    there = jax.device_count()
    used, can = count(config, there), valid(config, there)
    if hosts.count() > 1:  # each must have a part
        used, can = config.devices or there, [there] if there in can else []
    if used not in can:
        valid_here = ", ".join(map(str, can)) or "none"
        raise ConfigError(
            f"devices is {used}; valid here: {valid_here} (there are {there}, and collect.rows"
            f" {config.collect.rows}, {' '.join(map(str, config.batch))} and seeds {config.seeds}"
            " are shared equally)"
        )
    sharers = _sharers(config, used)
    return _mesh(used // sharers, sharers)


def of_one() -> jax.sharding.Mesh:
    """Returns the first device, [seeds, rows]."""
    return _mesh(1, 1)


def _mesh(groups: int, sharers: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (groups, sharers),
        (SEEDS, mesh.AXIS),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: groups * sharers],
    )
