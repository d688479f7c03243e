"""How much memory a run takes and how much there is: what cannot fit is refused by both."""

import math
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from experiments.config import RunConfig
from jmql.evaluate import AT_ONCE
from jmql.settings import ConfigError
from jmql.train import TrainState

# What a container may use, and uses, under cgroup version 2 and 1.
CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)

# What a compiled program needs follows from these before all.
SETTINGS = (
    "td3.batch_size, adapt.batch_multiple, adapt.shots, adapt.episodes, evaluate.episodes,"
    " evaluate.history_length, network.hidden_sizes"
)


def of_state(shapes: TrainState) -> int:
    """Returns the bytes that each device holds of a TrainState, leaves [S, ...]."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def at_least(
    config: RunConfig, length: int, held_out: int, shapes: TrainState, over: Mesh
) -> dict[str, int]:
    """Returns bytes that each device cannot do without beside its state, for each of the things
    that it does in turn, called by what they are and the settings that they follow from.

    Args:
        config: of the run.
        length: of an episode.
        held_out: tasks that are adapted to, up to `AT_ONCE` of them side by side.
        shapes: of the TrainState of every seed, leaves [S, ...], with the devices that hold them.
        over: devices [seeds, rows].
    """
    adapt, evaluate, network = config.adapt, config.evaluate, config.network
    actors, data = shapes.actors, shapes.memory.data
    groups, sharers = over.devices.shape
    seeds, tasks = config.seeds // groups, min(AT_ONCE, -(-held_out // sharers))

    agent = size(shapes.agent) // config.seeds
    row = size(actors.env_state) // actors.episode_return.size
    if config.algorithm == "p3o":
        sample = config.collect.unroll * (size(data) // data.reward.size)
        counts = {
            "training (p3o.minibatch, collect.unroll)": config.p3o.minibatch // sharers * sample,
            f"episodes of {held_out:,} held-out tasks (evaluate.episodes)": tasks
            * evaluate.episodes
            * row,
        }
        return {what: seeds * count for what, count in counts.items()}
    step = size(actors.history) // actors.history.mask.size
    if network.context_size == 0:
        step = 0  # nothing reads a history, and XLA leaves it out
    observation = size(data.observation) // data.reward.size
    sample = size(data) // data.reward.size + network.history_length * step
    seen = max(network.history_length, evaluate.history_length) * step
    episodes = 2 * max(adapt.episodes, evaluate.episodes)  # two actors play at a time
    agents = tasks * agent if adapt.step1_updates or adapt.updates else 0
    # One batch for all tasks.
    drawn = adapt.batch_multiple * config.td3.batch_size if adapt.updates else 0

    of = f"{held_out:,} held-out tasks"
    counts = {
        "training (td3.batch_size)": config.td3.batch_size // sharers * sample,
        f"episodes of {of} (adapt.episodes, evaluate.episodes, evaluate.history_length)": (
            tasks * episodes * (row + seen + length * observation)
        ),
        f"new data of {of} (adapt.shots, adapt.episodes)": (
            tasks * adapt.shots * adapt.episodes * length * sample
        ),
        f"agents of {of} (network.hidden_sizes) and a batch (adapt.batch_multiple,"
        " td3.batch_size)": agents + drawn * sample,
    }
    return {what: seeds * count for what, count in counts.items()}


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
