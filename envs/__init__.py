"""Task families. `load` finds one by its name, `make` makes its environment.

Reading the names imports nothing; a family is imported when it is asked for, and its physics engine
when an environment is made. docs/add_a_family.md says how to write one.
"""

import difflib
import importlib
import inspect
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.base import Environment

FAMILIES = {
    "ant": "envs.single:Ant",
    "ant_dir": "envs.ant:AntDir",
    "ant_goal": "envs.ant:AntGoal",
    "arm_pick": "envs.arm:ArmPick",
    "cheetah_dir": "envs.cheetah:CheetahDir",
    "cheetah_vel": "envs.cheetah:CheetahVel",
    "half_cheetah": "envs.single:HalfCheetah",
    "hopper": "envs.single:Hopper",
    "humanoid": "envs.single:Humanoid",
    "humanoid_dir": "envs.humanoid:HumanoidDir",
    "point_goal": "envs.point:PointGoal",
    "point_sparse": "envs.point:PointSparse",
    "walker2d": "envs.single:Walker2d",
    "walker_params": "envs.walker:WalkerParams",
}


def load(name: str) -> "type[Environment]":
    """Returns the class of a task family.

    Args:
        name: a key of `FAMILIES`, or `my_package.my_file:MyFamily`, which is looked for from the
            current folder first.

    Raises:
        ValueError: there is no such family, or it lacks what a family must have.
    """
    module_name, colon, class_name = FAMILIES.get(name, name).partition(":")
    if not colon:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        raise ValueError(
            f"no task family {name!r};{f' did you mean {near[0]}?' if near else ''} valid:"
            f" {', '.join(FAMILIES)}, or a class of your own, my_package.my_file:MyFamily"
        )
    from envs.base import Environment

    module = _import(name, module_name)
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, Environment)):
        what = "is not an envs.base.Environment" if hasattr(module, class_name) else "is not there"
        raise ValueError(
            f"task family {name!r}: {class_name!r} {what}; valid in {module_name}:"
            f" {', '.join(_families(module, Environment)) or 'none'}"
        )
    if found.__abstractmethods__:
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"task family {name!r} lacks {lacking}; valid: a class that has them all")
    return found


def make(name: str, backend: str | None = None, **kwargs: Any) -> "Environment":
    """Makes the environment of a task family.

    Args:
        name: as for `load`.
        backend: one of the family's backends; None is its first.
        kwargs: `episode_length` and `observe_task` of `envs.base.Environment`.

    Raises:
        ValueError: the family does not exist or does not run on the backend.
    """
    family = load(name)
    backend = family.backends[0] if backend is None else backend
    if backend not in family.backends:
        raise ValueError(
            f"{name} does not run on backend {backend!r}; it runs on {', '.join(family.backends)}"
        )
    if backend != "none":
        kwargs["backend"] = backend
    return family(**kwargs)


def _import(name: str, module_name: str) -> ModuleType:
    """Imports a family's module, the current folder's first, as `python -m` does."""
    if name not in FAMILIES and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # of whatever the file does
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"task family {name!r} cannot be imported from {os.getcwd()}: {why}; valid:"
            " my_package.my_file:MyFamily, with dots for folders and without .py"
        ) from error


def _families(module: ModuleType, environment: type) -> list[str]:
    """Returns the names of the families that a module defines."""
    return [
        name
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and issubclass(found, environment)
        and found.__module__ == module.__name__
        and not inspect.isabstract(found)
    ]
