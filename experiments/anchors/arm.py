"""What knowing the object is worth to `arm_pick`, by scripts, on MJX and in native MuJoCo.

`python -m experiments.anchors.arm [OUT.json]` prints the table, in some minutes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

import envs
from envs.arm import KINDS
from envs.base import Task
from experiments import devices
from jmql.types import Array, Key

OBJECTS, FRESH = 64, 128  # that the compromise is chosen on, and that all are played on
MANY, EPISODES = 256, 125  # objects that are played with at random, and episodes of each
# Fixed plans: x from the marker and z of the hand (m), share of the largest force.
GRID = (
    (-0.06, -0.03, 0.0, 0.03),
    (0.025, 0.04, 0.06, 0.08, 0.1, 0.13),
    (0.05, 0.1, 0.2, 0.3, 0.5),
)
PARTS = ("near", "far", "neck", "handle")
_CHUNK = 256  # of native MuJoCo's models at a time
_GRIP, _STRIDE, _LOW, _HIGH = 20.0, 0.04, np.array([-0.22, 0.023]), np.array([0.22, 0.40])


class Plan(NamedTuple):
    """How a script grasps. It sees the hand, and the marker on the object."""

    x: Array  # [] from the marker (m)
    z: Array  # [] above the floor (m)
    press: Array  # [] share of the largest force


Play = Callable[[Task, Plan, Key], dict[str, np.ndarray]]


class Progress(NamedTuple):
    """Where a script is."""

    phase: Array  # []: above the object, down, closing, up
    steps: Array  # [] in this phase


def act(plan: Plan, at: Progress, hand: Array, marker_x: Array) -> tuple[Array, Progress]:
    """Returns the action [3] of a script, and where it is then.

    It moves on when the hand is there, or after a second going down, or a third of one closing.
    """
    phase = at.phase
    x = jnp.where(phase < 2, marker_x + plan.x, hand[0])
    z = jnp.stack([0.30, jnp.maximum(plan.z, 0.02), hand[1], 0.36])[phase]
    way = jnp.clip(1.2 / _STRIDE * (jnp.stack([x, z]) - hand), -1.0, 1.0)
    way = way.at[1].set(jnp.where(phase == 3, jnp.clip(way[1], -0.6, 0.6), way[1]))
    action = jnp.append(way, jnp.where(phase < 2, -1.0, jnp.sqrt(plan.press)))
    steps = at.steps + 1
    done = jnp.stack(
        [
            (jnp.abs(x - hand[0]) < 0.008) & (jnp.abs(hand[1] - 0.30) < 0.03),
            (jnp.abs(z - hand[1]) < 0.008) | (steps > 25),
            steps > 8,
            jnp.zeros((), bool),
        ]
    )[phase]
    return action, Progress(phase + done, jnp.where(done, 0, steps))


def on_mjx(env: Any) -> Play:
    """Returns what plays plans [N] on tasks [N], and returns `return`, `success` and `crushed`,
    [N] each.
    """

    def play(task: Task, plan: Plan, key: Key) -> Any:
        def step(carry: Any, _: None) -> Any:
            state, at, on, extras = carry
            marker = env.on_object(state.physics, jnp.stack([task["marker"], 0.0]))
            action, at = act(plan, at, env.hand(state.physics), marker[0])
            state = env.step(state, action)
            reward = jnp.where(on, state.reward, 0.0)
            extras = jax.tree.map(lambda new, old: jnp.where(on, new, old), state.extras, extras)
            on &= ~(state.terminated | state.truncated)
            return (state, at, on, extras), reward

        state, at = env.reset(key, task), Progress(jnp.int32(0), jnp.int32(0))
        begin = state, at, jnp.ones((), bool), state.extras
        (_, _, _, extras), rewards = jax.lax.scan(step, begin, length=env.episode_length)
        return {"return": rewards.sum()} | extras

    compiled = jax.jit(jax.vmap(play))

    def played(tasks: Task, plans: Plan, key: Key) -> dict[str, np.ndarray]:
        found = compiled(tasks, plans, jax.random.split(key, len(plans.x)))
        return {name: np.asarray(leaf) for name, leaf in found.items()}

    return played


class Native:
    """One object in native MuJoCo, compiled with it, and its rewards in NumPy.

    Args:
        task: leaves without a leading axis.
    """

    def __init__(self, task: Task):
        self.task = {name: np.asarray(leaf, float) for name, leaf in task.items()}
        source = mujoco.MjSpec.from_file(str(Path(envs.__file__).parent / "assets/arm.xml"))
        for part, size, place in zip(PARTS, self.task["size"], self.task["place"], strict=True):
            geom = source.geom(part)
            geom.size, geom.pos = [*size, 0.0], [place[0], 0.0, place[1]]
            geom.friction = [self.task["friction"], 0.005, 0.0001]
        thing = source.body("object")
        thing.explicitinertial, thing.mass = True, self.task["mass"]
        thing.inertia = np.full(3, self.task["inertia"])
        thing.ipos = [0.0, 0.0, self.task["center"]]
        self.model = source.compile()
        self.data = mujoco.MjData(self.model)

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Begins at a state."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self.model, self.data)

    def hand(self) -> np.ndarray:
        """[2]: the point between the fingertips."""
        wrist = self.data.body("hand")
        tip = wrist.xpos + wrist.xmat.reshape(3, 3) @ [0.0, 0.0, -0.13]
        return tip[[0, 2]]

    def on_object(self, point: np.ndarray) -> np.ndarray:
        """[2]: where a point of the object's frame is."""
        thing = self.data.body("object")
        return (thing.xpos + thing.xmat.reshape(3, 3) @ [point[0], 0.0, point[1]])[[0, 2]]

    def gaps(self) -> np.ndarray:
        """[2]: from the left and the right finger to the object (m)."""
        return np.array(
            [
                min(
                    mujoco.mj_geomDistance(
                        self.model,
                        self.data,
                        self.model.geom(finger).id,
                        self.model.geom(part).id,
                        1.0,
                        None,
                    )
                    for part in PARTS
                )
                for finger in ("left", "right")
            ]
        )

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """Takes a control step; returns `reward`, `success`, `crushed` and `touch` [2]."""
        model, data, task = self.model, self.data, self.task
        target = np.clip(self.hand() + _STRIDE * action[:2], _LOW, _HIGH)
        x, z = target + np.array([0.45, 0.13 - 0.30])  # of the wrist from the shoulder
        far = np.clip(np.hypot(x, z), 0.1, 0.715)
        up, bend = np.arctan2(z, x), np.arccos(far / 0.72)
        data.ctrl[:3] = up + bend, -2 * bend, bend - up
        data.ctrl[3:] = -_GRIP * action[2] * abs(action[2])
        for substep in range(8):
            if substep == 7:  # contacts are those that the last substep begins with
                mujoco.mj_kinematics(model, data)
                touch = self.gaps() < 0.001
            mujoco.mj_step(model, data)
        mujoco.mj_kinematics(model, data)
        center = task["center"]
        rise = self.on_object(np.array([0.0, center]))[1] - center
        reach = 1 - np.tanh(8 * np.linalg.norm(self.hand() - self.on_object(task["grasp"])))
        over = _GRIP * action[2] ** 2 / task["crush"] - 1
        held = bool(touch.all())
        crush = float(np.clip(over, 0, 1)) if held else 0.0
        lift = np.clip(rise / 0.12, 0, 1)
        return {
            "reward": (0.25 * reach * (1 + held) + lift) * (1 - 0.4 * crush),
            "success": bool(rise > 0.1 and crush == 0),
            "crushed": crush > 0,
            "touch": touch,
        }


def in_mujoco(env: Any) -> Play:
    """As `on_mjx`, from the same states, in native MuJoCo."""
    reset = jax.jit(jax.vmap(lambda key, task: env.reset(key, task).physics))
    script = jax.jit(jax.vmap(act))

    def some(tasks: Task, plans: Plan, q: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
        count = len(q)
        rows = [Native(jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(count)]
        for row, position, velocity in zip(rows, q, v, strict=True):
            row.reset(position, velocity)
        at = Progress(jnp.zeros(count, int), jnp.zeros(count, int))
        on = np.ones(count, bool)
        found = {name: np.zeros(count) for name in ("return", "success", "crushed")}
        for _ in range(env.episode_length):
            hands = np.array([row.hand() for row in rows])
            markers = [row.on_object(np.array([row.task["marker"], 0.0]))[0] for row in rows]
            actions, at = script(plans, at, hands, np.array(markers))
            for i in np.flatnonzero(on).tolist():
                seen = rows[i].step(np.clip(np.asarray(actions[i]), -1, 1))
                found["return"][i] += seen["reward"]
                found["success"][i], found["crushed"][i] = seen["success"], seen["crushed"]
                on[i] = abs(rows[i].data.qpos[5]) <= 0.4
        return found

    def played(tasks: Task, plans: Plan, key: Key) -> dict[str, np.ndarray]:
        physics = reset(jax.random.split(key, len(plans.x)), tasks)
        given = jax.tree.map(np.asarray, (tasks, plans, physics.q, physics.qd))
        parts = [
            some(*jax.tree.map(lambda x, i=i: x[i : i + _CHUNK], given))
            for i in range(0, len(plans.x), _CHUNK)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return played


def blow_ups(env: Any, objects: int, episodes: int) -> int:
    """Returns how many steps of random actions end in physics that is not finite."""
    tasks = env.sample_tasks(jax.random.key(0), objects)

    def play(key: Key) -> Array:
        def step(states: Any, key: Key) -> Any:
            size = (objects, env.action_size)
            actions = jax.random.uniform(key, size, minval=-1.0, maxval=1.0)
            states = jax.vmap(env.step)(states, actions)
            return states, states.blew_up.sum()

        reset_key, step_key = jax.random.split(key)
        first = jax.vmap(env.reset)(jax.random.split(reset_key, objects), tasks)
        return jax.lax.scan(step, first, jax.random.split(step_key, env.episode_length))[1].sum()

    keys = jax.random.split(jax.random.key(1), episodes)
    return int(jax.jit(lambda keys: jax.lax.map(play, keys).sum())(keys))


def force(tasks: Task, margin: float = 3.0) -> Array:
    """Returns the share of the largest force that holds objects [N] and does not crush them."""
    holds = tasks["mass"] * 9.81 / (2 * tasks["friction"])
    return jnp.clip(jnp.minimum(margin * holds + 1.0, tasks["crush"]) / _GRIP, 0.05, 1.0)


def right(tasks: Task) -> Plan:
    """Returns the plans of one who knows all of objects [N]."""
    return Plan(tasks["grasp"][:, 0] - tasks["marker"], tasks["grasp"][:, 1], force(tasks))


def of_kind(env: Any, kind: int) -> Plan:
    """Returns the plan [] for the middle of a kind, with the marker at its middle."""
    middle = {name: jnp.float32(low + high) / 2 for name, (low, high) in env.ranges.items()}
    task = env.make_task(**middle | {"kind": jnp.float32(kind + 0.5)})
    return jax.tree.map(lambda x: x[0], right(jax.tree.map(lambda x: x[None], task)))


def everywhere(plan: Plan, count: int) -> Plan:
    """Returns plans [P] for each of some objects, [P * count]."""
    return Plan(*(jnp.repeat(jnp.atleast_1d(leaf), count) for leaf in plan))


def repeated(tree: Any, times: int) -> Any:
    """Returns leaves [N, ...] some times over."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * times), tree)


def table(env: Any, play: Play) -> dict[str, Any]:
    """Returns return, success and crushed by script and kind, of fresh objects."""
    seen = env.sample_tasks(jax.random.key(99), OBJECTS)
    knows = right(seen)
    x, z, press = (jnp.asarray(leaf.ravel(), float) for leaf in np.meshgrid(*GRID))
    fixed = everywhere(Plan(x, z, press), OBJECTS)  # one plan for whatever comes
    forces = [knows._replace(press=jnp.full(OBJECTS, force)) for force in GRID[2]]
    tried = jax.tree.map(lambda *x: jnp.concatenate(x), fixed, *forces)
    times = len(tried.x) // OBJECTS
    earned = play(repeated(seen, times), tried, jax.random.key(98))["return"]
    means = earned.reshape(times, OBJECTS).mean(1)
    best = int(means[: len(x)].argmax())
    force = GRID[2][int(means[len(x) :].argmax())]

    per_kind = [
        env.sample_tasks(jax.random.key(k), FRESH // len(KINDS), {"kind": (k, k + 1.0)})
        for k in range(len(KINDS))
    ]
    tasks = jax.tree.map(lambda *x: jnp.concatenate(x), *per_kind)
    count = len(tasks["mass"])
    compromise, knows = Plan(x[best], z[best], press[best]), right(tasks)
    scripts = {
        "knows all": knows,
        "knows all but the force": knows._replace(press=jnp.full(count, force)),
        "knows all but the marker": knows._replace(x=tasks["grasp"][:, 0]),
        "best of all fixed plans": everywhere(compromise, count),
    }
    scripts |= {
        f"as for a {kind}": everywhere(of_kind(env, k), count) for k, kind in enumerate(KINDS)
    }
    plans = jax.tree.map(lambda *x: jnp.concatenate(x), *scripts.values())
    played = play(repeated(tasks, len(scripts)), plans, jax.random.key(7))
    rows: dict[str, Any] = {
        "plan": [round(float(leaf), 3) for leaf in compromise],
        "force": force,
    }
    for i, name in enumerate(scripts):
        rows[name] = {
            what: values.reshape(len(scripts), len(KINDS), -1)[i].mean(1).round(3).tolist()
            for what, values in played.items()
        }
    return rows


def main() -> None:
    """Prints the tables, and writes them."""
    devices.prepare(1)
    env = envs.make("arm_pick")
    found = {"mjx": table(env, on_mjx(env)), "native": table(env, in_mujoco(env))}
    steps = MANY * EPISODES * env.episode_length
    found["random"] = {"steps": steps, "blew_up": blow_ups(env, MANY, EPISODES)}
    print(f"random play of {MANY} objects: {found['random']}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    for engine in ("mjx", "native"):
        rows = found[engine]
        plan, force = rows.pop("plan"), rows.pop("force")
        print(f"\n{engine}: the best plan is {plan} (x, z, force), the best force {force}")
        print(f"{'return / success':26} {'all':>12} " + " ".join(f"{kind:>12}" for kind in KINDS))
        for name, row in rows.items():
            cells = [(np.mean(row["return"]), np.mean(row["success"]))]
            cells += list(zip(row["return"], row["success"], strict=True))
            print(f"{name:26} " + " ".join(f"{r:5.1f} / {s:4.2f}" for r, s in cells))


if __name__ == "__main__":
    main()
