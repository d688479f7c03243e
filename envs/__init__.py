"""Task families. `make` is the way in; families and engines are imported when asked for."""

import dataclasses
import importlib
from typing import Any

from envs.base import BACKENDS, Environment


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family is defined, and the physics backends it runs on, the default first."""

    module: str
    cls: str
    backends: tuple[str, ...]


NO_ENGINE = ("none",)
MJX_ONLY = ("mjx",)  # what is observed, or scaled, no other engine has: see the family
FAMILIES = {
    "ant_dir": Family("envs.ant", "AntDir", BACKENDS),
    "ant_goal": Family("envs.ant", "AntGoal", BACKENDS),
    "cheetah_dir": Family("envs.cheetah", "CheetahDir", BACKENDS),
    "cheetah_vel": Family("envs.cheetah", "CheetahVel", BACKENDS),
    "humanoid_dir": Family("envs.humanoid", "HumanoidDir", MJX_ONLY),
    "point_goal": Family("envs.point", "PointGoal", NO_ENGINE),
    "point_sparse": Family("envs.point", "PointSparse", NO_ENGINE),
    "walker_params": Family("envs.walker", "WalkerParams", MJX_ONLY),
}


def make(name: str, backend: str | None = None, **kwargs: Any) -> Environment:
    """Makes the environment of a task family.

    Args:
        name: a key of `FAMILIES`.
        backend: one of the family's backends; None is its first.
        kwargs: `episode_length` and `observe_task` of `envs.base.Environment`.

    Raises:
        ValueError: the family does not exist or does not run on the backend.
    """
    if name not in FAMILIES:
        raise ValueError(f"no task family {name!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    backend = family.backends[0] if backend is None else backend
    if backend not in family.backends:
        raise ValueError(
            f"{name} does not run on backend {backend!r}; it runs on {', '.join(family.backends)}"
        )
    cls = getattr(importlib.import_module(family.module), family.cls)
    if family.backends is not NO_ENGINE:
        kwargs["backend"] = backend
    return cls(**kwargs)
