"""Arm family: pick up an object that is not shown (docs/tasks.md section 4)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from envs.base import Array, Ranges, Task
from envs.physics import Body, Engine

_SHOULDER = (-0.45, 0.30)  # x and z (m)
_LINK = 0.36  # each of the two (m)
_HAND = 0.13  # from the wrist to the point between the fingertips (m)
_STRIDE = 0.04  # a target is at most so far from the hand, along each axis (m)
_LOW, _HIGH = (-0.22, 0.023), (0.22, 0.40)  # where a target may be (m)
_GRIP = 20.0  # the largest force of a finger (N)
_GRAVITY = 9.81
_TOUCH = 0.001  # a finger nearer than this touches (m)
_RISE = 0.12  # pays in full (m)
_LIFTED = 0.1  # counts as a success (m)
_AWAY = 0.4  # the object is lost (m)
_HIDDEN = 0.003, 0.001  # radius and half length of a part that an object lacks (m)


class Shape(NamedTuple):
    """An object: two upright walls, a neck and a handle, capsules all. It stands on its origin."""

    size: Array  # [4, 2]: radius and half of the length of the axis (m)
    place: Array  # [4, 2]: x and z of the centers (m)
    grasp: Array  # [2]: x and z of where it is held best (m)


def _shape(
    apart: Array | float,
    radius: Array | float,
    half: Array | float,
    hold: tuple[Array | float, Array | float],
    neck: tuple[Array | float, ...] | None = None,
    handle: tuple[Array | float, ...] | None = None,
) -> Shape:
    """Returns an object of walls at +-`apart`; neck and handle are (radius, half, x, z)."""
    middle = radius + half
    hidden = (*_HIDDEN, apart, middle)  # within a wall: what it lacks
    walls = [(radius, half, -apart, middle), (radius, half, apart, middle)]
    parts = [*walls, neck or hidden, handle or hidden]
    table = jnp.stack([jnp.stack([jnp.asarray(x, float) for x in part]) for part in parts])
    return Shape(table[:, :2], table[:, 2:], jnp.stack([jnp.asarray(x, float) for x in hold]))


def _ball(width: Array, height: Array) -> Shape:  # noqa: ARG001
    radius = 0.034 * width
    return _shape(0.0, radius, 0.001, hold=(0.0, radius + 0.001))


def _mug(width: Array, height: Array) -> Shape:
    """Too wide for the gripper: held best by the rim that has no handle."""
    apart, radius, half = 0.062 * width, 0.007, 0.035 * height
    rim = 2 * (half + radius)
    handle = (0.006, 0.018 * height, apart + 0.02, half + radius)
    return _shape(apart, radius, half, hold=(-apart, rim - 0.02), handle=handle)


def _can(width: Array, height: Array) -> Shape:
    apart, radius, half = 0.018 * width, 0.014, 0.04 * height
    core = (0.012 * width, half, 0.0, half + radius)
    return _shape(apart, radius, half, hold=(0.0, 1.2 * (half + radius)), neck=core)


def _rod(width: Array, height: Array) -> Shape:
    apart, radius, half = 0.012 * width, 0.008, 0.012 * height
    return _shape(apart, radius, half, hold=(0.0, 1.1 * (half + radius)))


def _bottle(width: Array, height: Array) -> Shape:
    """Too wide for the gripper but for its neck."""
    apart, radius, half = 0.04 * width, 0.016, 0.035 * height
    top = 2 * (half + radius)
    neck = (0.013 * width, 0.03, 0.0, top + 0.02)
    return _shape(apart, radius, half, hold=(0.0, top + 0.03), neck=neck)


_SHAPES: dict[str, Callable[[Array, Array], Shape]] = {
    "ball": _ball,
    "mug": _mug,
    "can": _can,
    "rod": _rod,
    "bottle": _bottle,
}
KINDS = tuple(_SHAPES)


def _without(kind: int) -> tuple[Ranges, Ranges]:
    """Returns the ranges of training and of held-out tasks where one kind is held out."""
    n = len(KINDS)
    return {"kind": (kind + 1.0, kind + n)}, {"kind": (float(kind), kind + 1.0)}


class ArmPick(Body):
    """Task: an object of a kind of its own, in shape, mass, friction, and in what crushes it.

    Reward is (0.25 reach (1 + held) + lift) (1 - 0.4 crush), each from 0 to 1. Everything moves in
    the x-z plane. The observation is of the hand and of a marker on the object, which sits at an
    unknown place of its base.
    """

    worst_reward = 0.0
    parameters: ClassVar = {
        "kind": f"{', '.join(KINDS)}, counted from 0 and around",
        "size": "radius and half length of its four capsules (m)",
        "place": "x and z of their centers (m)",
        "grasp": "x and z of where it is held best (m)",
        "center": "height of its center of mass (m)",
        "marker": "x of what is observed of it (m)",
        "mass": "of it (kg)",
        "inertia": "about its center of mass (kg m^2)",
        "friction": "between it and what it touches",
        "crush": "force that it bears (N)",
        "width": "of its shape (factor)",
        "height": "of its shape (factor)",
        "log_mass": "logarithm of its mass in kg",
        "strength": "crushing force over what holds it",
    }
    ranges: ClassVar = {
        "kind": (0.0, float(len(KINDS))),
        "width": (0.85, 1.15),
        "height": (0.8, 1.25),
        "marker": (-0.03, 0.03),
        "log_mass": (-3.0, -0.5),
        "friction": (0.6, 1.2),
        "strength": (4.0, 6.0),
    }
    limits: ClassVar = {
        "kind": (0.0, 2.0 * len(KINDS)),
        "width": (0.5, 1.5),
        "height": (0.5, 2.0),
        "marker": (-0.1, 0.1),
        "log_mass": (-4.0, 0.0),
        "friction": (0.3, 2.0),
        "strength": (1.0, 10.0),
    }
    splits: ClassVar = {
        "ood": _without(KINDS.index("bottle")),
        **{f"no_{kind}": _without(i) for i, kind in enumerate(KINDS)},
    }
    body = "arm"
    model = Path(__file__).parent / "assets/arm.xml"
    engines: ClassVar = {"mjx": Engine(timestep=0.005, substeps=8)}
    action_size = 3

    def __init__(self, backend: str, episode_length: int = 80, observe_task: bool = False):
        super().__init__(backend, episode_length=episode_length, observe_task=observe_task)

    @classmethod
    def title(cls, task: Task) -> str:
        """The kind and the mass."""
        return f"{KINDS[int(task['kind'])]}, {float(task['mass']):.2f} kg"

    def draw_task(self, key: Array, ranges: Ranges) -> Task:
        """Draws an object."""
        keys = dict(zip(self.ranges, jax.random.split(key, len(self.ranges)), strict=True))
        return self.make_task(
            **{
                name: jax.random.uniform(keys[name], minval=low, maxval=high)
                for name, (low, high) in ranges.items()
            }
        )

    def make_task(
        self,
        kind: Array,
        width: Array,
        height: Array,
        marker: Array,
        log_mass: Array,
        friction: Array,
        strength: Array,
    ) -> Task:
        """Returns an object, [] each: see `parameters`."""
        index = jnp.floor(kind).astype(int) % len(KINDS)
        shapes = [make(width, height) for make in _SHAPES.values()]
        shape = jax.tree.map(lambda *x: jnp.stack(x)[index], *shapes)
        wall, half = shape.size[0]
        mass, high, wide = jnp.exp(log_mass), wall + half, wall + shape.place[1, 0]
        holds = mass * _GRAVITY / (2 * friction)  # force of each finger (N)
        return shape._asdict() | {
            "kind": index.astype(float),
            "center": high,
            "marker": marker,
            "mass": mass,
            "inertia": mass * (jnp.square(wide) + jnp.square(high)) / 3,  # of a box
            "friction": friction,
            "crush": strength * holds + 1.5,
        }

    def system(self, task: Task) -> Any:
        """The arm with the object of the task."""
        size = jnp.pad(task["size"], ((0, 0), (0, 1)))
        place = jnp.stack([task["place"][:, 0], jnp.zeros(4), task["place"][:, 1]], axis=1)
        return self.rebuilt_system(
            "object",
            size=size,
            place=place,
            friction=task["friction"],
            mass=task["mass"],
            inertia=jnp.full(3, task["inertia"]),
            center=task["center"] * jnp.array([0.0, 0.0, 1.0]),
        )

    def joints(self, hand: Array) -> Array:
        """Returns shoulder, elbow and wrist [3] (rad) with the hand at [2] (m), upright."""
        way = hand + jnp.array([0.0, _HAND]) - jnp.array(_SHOULDER)
        far = jnp.clip(jnp.linalg.norm(way), 0.1, 2 * _LINK - 0.005)
        lead = jnp.arccos(far / (2 * _LINK))  # both links are equally long
        shoulder = jnp.arctan2(way[1], way[0]) + lead
        return jnp.stack([shoulder, -2 * lead, lead - jnp.arctan2(way[1], way[0])])

    def hand(self, physics: Any) -> Array:
        """Returns the point between the fingertips, [2] (m)."""
        upper, fore, tilt = jnp.cumsum(self.position(physics)[:3])
        return jnp.array(_SHOULDER) + jnp.stack(
            [
                _LINK * (jnp.cos(upper) + jnp.cos(fore)) + _HAND * jnp.sin(tilt),
                _LINK * (jnp.sin(upper) + jnp.sin(fore)) - _HAND * jnp.cos(tilt),
            ]
        )

    def torso(self, physics: Any) -> Array:
        """The hand, in the world, [3] (m): what is followed in pictures."""
        x, z = self.hand(physics)
        return jnp.stack([x, jnp.zeros(()), z])

    def on_object(self, physics: Any, point: Array) -> Array:
        """Returns where a point [2] of the object's frame is, [2] (m)."""
        x, z, pitch = self.position(physics)[5:]
        cos, sin = jnp.cos(pitch), jnp.sin(pitch)
        return jnp.stack([x + cos * point[0] - sin * point[1], z + sin * point[0] + cos * point[1]])

    def start(self, key: Array, task: Task) -> Any:
        """The hand at x = 0 +- 3 cm, 0.3 m above the floor and open; the object at x +- 10 cm."""
        hand_key, object_key = jax.random.split(key)
        hand = jax.random.uniform(hand_key, (2,), minval=-0.03, maxval=0.03)
        x = jax.random.uniform(object_key, (1,), minval=-0.1, maxval=0.1)
        joints = self.joints(hand + jnp.array([0.0, 0.3]))
        q = jnp.concatenate([joints, jnp.full(2, 0.04), x, jnp.zeros(2)])
        return self.placed(task, q, jnp.zeros(8))

    def advance(self, physics: Any, action: Array, task: Task) -> Any:
        """Action [3]: where the hand goes, x and z, as a share of a stride, and how the fingers
        press: its square is a share of the largest force, and above 0 they close. So small forces
        can be told apart, which a light object needs.
        """
        target = jnp.clip(
            self.hand(physics) + _STRIDE * action[:2], jnp.array(_LOW), jnp.array(_HIGH)
        )
        press = jnp.full(2, -_GRIP * action[2] * jnp.abs(action[2]))
        return self.driven(physics, jnp.concatenate([self.joints(target), press]), task)

    def observe(self, physics: Any, task: Task) -> Array:
        """[16]: the hand's place 2, opening, tilt and the velocities of its joints 4; of the marker
        on the object: its place from the hand 2, height, the object's pitch as sine and cosine, and
        its velocities 3.
        """
        q, v = self.position(physics), self.velocity(physics)
        hand = self.hand(physics)
        marker = self.on_object(physics, jnp.stack([task["marker"], jnp.zeros(())]))
        return jnp.concatenate(
            [
                hand,
                q[3:4],
                jnp.sin(q[:3].sum(keepdims=True)),
                v[:4],
                marker - hand,
                marker[1:],
                jnp.stack([jnp.sin(q[7]), jnp.cos(q[7])]),
                v[5:],
            ]
        )

    def touches(self, physics: Any) -> Array:
        """Returns whether the left and the right finger are on the object, [2] bool.

        By distance, for the sign of a contact flickers on MJX from step to step.
        """
        gaps = [self.gap(physics, finger, "object") for finger in ("left", "right")]
        return jnp.stack(gaps) < _TOUCH

    def rise(self, physics: Any, task: Task) -> Array:
        """Returns how far the object's center of mass is above where it began, [] (m)."""
        center = self.on_object(physics, jnp.stack([jnp.zeros(()), task["center"]]))
        return center[1] - task["center"]

    def crushing(self, physics: Any, task: Task) -> Array:
        """Returns how much the fingers press beyond what the object bears, [] in [0, 1]."""
        force = jnp.abs(self.command(physics)[3])
        over = jnp.clip(force / task["crush"] - 1.0, 0.0, 1.0)
        return jnp.where(self.touches(physics).all(), over, 0.0)

    def reward(self, before: Any, after: Any, action: Array, task: Task) -> Array:
        """For being near where it is held best, for holding it, and for its height; less by up to
        40 % where it is crushed.
        """
        away = jnp.linalg.norm(self.hand(after) - self.on_object(after, task["grasp"]))
        reach = 1.0 - jnp.tanh(8.0 * away)
        lift = jnp.clip(self.rise(after, task) / _RISE, 0.0, 1.0)
        crush = self.crushing(after, task)
        held = self.touches(after).all()
        return (0.25 * reach * (1.0 + held) + lift) * (1.0 - 0.4 * crush)

    def unhealthy(self, physics: Any) -> Array:
        """The object is out of reach."""
        return jnp.abs(self.position(physics)[5]) > _AWAY

    def extras(self, physics: Any, task: Task) -> dict[str, Array]:
        """Whether it is lifted by 0.1 m and is not being crushed, and whether it is."""
        crushed = self.crushing(physics, task) > 0.0
        success = (self.rise(physics, task) > _LIFTED) & ~crushed
        return {"success": success.astype(float), "crushed": crushed.astype(float)}
