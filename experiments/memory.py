"""How much memory a run takes and how much there is: what cannot fit is refused by both."""

import math
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from experiments.config import RunConfig
from jmql import replay
from jmql.settings import ConfigError
from jmql.train import TrainState

# What a container may use, and uses, under cgroup version 2 and 1.
CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def at_least(config: RunConfig, shapes: TrainState, over: Mesh) -> int:
    """Returns bytes that training cannot do without: its state, and for each seed a batch and an
    agent for each held-out task, which are all adapted to side by side. See `in_one`.

    Args:
        config: of the run.
        shapes: of the TrainState of every seed, leaves [S, ...], with the devices that hold them.
        over: devices [seeds, rows].
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    num, history = config.td3.batch_size, config.network.history_length
    batch = jax.eval_shape(lambda m, k: replay.sample(m, k, num, history), one.memory, key)
    groups, sharers = over.devices.shape
    adapted = -(-config.tasks.held_out // sharers) * size(one.agent)
    seeds = config.seeds // groups * (size(batch) // sharers + adapted)
    state = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )
    return in_one(state + seeds, over)


def in_one(count: int, over: Mesh) -> int:
    """Returns the bytes in one memory where each device takes `count`: cores share theirs."""
    return count * over.size if over.devices.flat[0].platform == "cpu" else count


def of_program(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled program takes on each device beside its arguments."""
    used = compiled.memory_analysis()
    if used is None:  # a backend that does not say
        return 0
    new = used.output_size_in_bytes - used.alias_size_in_bytes
    return int(new + used.temp_size_in_bytes)


def there_is() -> int:
    """Returns the bytes that are free where JAX computes, on the fullest device."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stat and "bytes_limit" in stat for stat in stats):
        return min(int(stat["bytes_limit"] - stat.get("bytes_in_use", 0)) for stat in stats)
    return min(psutil.virtual_memory().available, *(_left(*files) for files in _LIMITS))


def _left(limit: str, used: str) -> int:
    """Returns what a control group leaves, or a large number where there is none."""
    try:
        limited, in_use = (int((CGROUPS / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # not there, or "max"
        return 2**63
    return limited - in_use


def refuse_too_much(what: str, count: int) -> None:
    """Raises ConfigError if `count` bytes are more than there are.

    Args:
        what: needs them, and what makes it smaller.
        count: in bytes.
    """
    free = there_is()
    if count > free:
        raise ConfigError(
            f"{what} needs {human_bytes(count)} of memory and {human_bytes(free)} are free"
        )


def size(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def human_bytes(count: float) -> str:
    """Returns a size for people, such as `190 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
