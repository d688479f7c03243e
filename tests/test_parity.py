"""Physics, observations and rewards of backend mjx against native MuJoCo, from the same state.

The other side is the simulator itself, stepped here, and rewards written anew in NumPy from its
`MjData`. Each family compiles once for a precision: its rows hold different tasks.

How long two simulators can agree is a property of the body. Native MuJoCo against itself, moved by
1e-15 m: half-cheetah under random torques differs by 1e-8 to 1e-5 after 50 control steps.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import warnings
from typing import ClassVar
from unittest import mock

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco.mjx._src import collision_driver, collision_primitive
from mujoco.mjx._src import math as mjx_math

import envs
from envs.base import Environment
from envs.physics import Body, Engine
from envs.steps import solves

ASSETS = pathlib.Path(importlib.util.find_spec("gymnasium").origin).parent / "envs/mujoco/assets"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What TASKS says of a body, apart from `envs`."""

    model: str
    timestep: float
    substeps: int
    integrator: int
    reset: float  # bound of the noise of positions

    @property
    def dt(self) -> float:
        return self.timestep * self.substeps


EULER, RK4 = 0, 1
CHEETAH = Facts("half_cheetah.xml", 0.01, 5, EULER, 0.1)
ANT = Facts("ant.xml", 0.01, 5, RK4, 0.1)
HUMANOID = Facts("humanoid.xml", 0.003, 5, RK4, 0.01)
WALKER = Facts("walker2d.xml", 0.004, 4, RK4, 0.005)
BODIES = {
    "cheetah_dir": CHEETAH,
    "cheetah_vel": CHEETAH,
    "ant_dir": ANT,
    "ant_goal": ANT,
    "humanoid_dir": HUMANOID,
    "walker_params": WALKER,
    "hopper": Facts("hopper.xml", 0.002, 4, RK4, 0.005),
    "walker2d": dataclasses.replace(WALKER, timestep=0.002),
}


# --- Native MuJoCo.


def native_model(body: Facts, scales: dict[str, np.ndarray] | None = None) -> mujoco.MjModel:
    """Returns a model as the benchmark runs it, with scaled parameters where there are scales."""
    mujoco.set_mju_user_warning(lambda message: None)
    model = mujoco.MjModel.from_xml_path(str(ASSETS / body.model))
    assert model.opt.integrator == body.integrator
    model.opt.timestep = body.timestep
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    # At its default tolerance native MuJoCo may stop a step of Newton early, and be 5e-7 off.
    model.opt.tolerance = 1e-14
    if scales is not None:  # and nothing derived from them is computed again
        model.body_mass[1:] *= scales["mass"]
        model.body_inertia[1:] *= scales["inertia"]
        model.dof_damping[:] *= scales["damping"]
        model.geom_friction[:] *= scales["friction"]
    return model


def center_of_mass(model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
    return model.body_mass @ data.xipos / model.body_mass.sum()


def looks(model: mujoco.MjModel, data: mujoco.MjData) -> dict[str, np.ndarray]:
    """Returns copies of what observations and rewards are made of."""
    names = ("qpos", "qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    found = {name: getattr(data, name).copy() for name in names}
    return found | {"torso": data.xpos[1].copy(), "com": center_of_mass(model, data)}


def native_play(
    model: mujoco.MjModel, body: Facts, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray
) -> dict[str, np.ndarray]:
    """Plays actions [T, A] from a state; returns what is seen then and after each step, [T+1]."""
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = qpos, qvel
    mujoco.mj_forward(model, data)
    seen = [looks(model, data) | {"limbs": False}]
    low, high = model.actuator_ctrlrange.T
    for action in np.clip(actions, -1, 1):
        data.ctrl[:] = low + (action + 1) / 2 * (high - low)
        limbs = False
        for _ in range(body.substeps):
            mujoco.mj_step(model, data)
            limbs |= bool((data.contact.geom > 0).all(1).any())  # 0 is the floor
        seen.append(looks(model, data) | {"limbs": limbs})
    return {name: np.array([s[name] for s in seen]) for name in seen[0]}


def native_observation(family: str, s: dict[str, np.ndarray]) -> np.ndarray:
    q, v = s["qpos"], s["qvel"]
    flat = {name: s[name].reshape(len(q), -1) for name in ("cinert", "cvel", "cfrc_ext")}
    parts = {
        "cheetah_dir": (q[:, 1:], v, s["torso"]),
        "cheetah_vel": (q[:, 1:], v, s["torso"]),
        "ant_dir": (q[:, 2:], v),
        "ant_goal": (q, v),
        "humanoid_dir": (
            *(q[:, 2:], v, flat["cinert"], flat["cvel"], s["qfrc_actuator"], flat["cfrc_ext"]),
        ),
    }
    parts |= dict.fromkeys(("walker_params", "walker2d", "hopper"), (q[:, 1:], np.clip(v, -10, 10)))
    parts = parts[family]
    return np.concatenate(parts, -1)


def native_reward(
    family: str, s: dict[str, np.ndarray], actions: np.ndarray, task: dict[str, np.ndarray]
) -> np.ndarray:
    """Returns the reward of each step [T]; actions [T, A] as chosen."""
    x, dt = s["qpos"][:, 0], BODIES[family].dt
    speed = np.diff(x) / dt
    cost = (np.clip(actions, -1, 1) ** 2).sum(-1)

    def along(places: np.ndarray) -> np.ndarray:
        way = np.diff(places[:, :2], axis=0)
        return way[:, 0] * np.cos(task["angle"]) + way[:, 1] * np.sin(task["angle"])

    if family == "cheetah_dir":
        return task["direction"] * speed - 0.05 * cost
    if family == "cheetah_vel":
        return -np.abs(speed - task["velocity"]) - 0.05 * cost
    if family == "ant_dir":
        return along(s["torso"]) / 0.05 - 0.5 * cost + 1
    if family == "ant_goal":
        return -np.abs(s["torso"][1:, :2] - task["goal"]).sum(-1) - 0.1 * cost
    if family == "humanoid_dir":
        return 0.25 * along(s["com"]) / 0.003 - 0.1 * 0.4**2 * cost + 5
    return speed + 1 - 0.001 * cost  # walkers and hopper


# --- Our environments.


@dataclasses.dataclass
class Play:
    """Both simulators from the same states under the same actions."""

    family: str
    env: Environment
    task: dict[str, np.ndarray]  # [rows, ...]
    actions: np.ndarray  # [T, rows, A]
    physics: object  # after reset and after each step, [T+1, rows, ...]
    observation: np.ndarray  # [T+1, rows, O]
    reward: np.ndarray  # [T, rows]
    native: list[dict[str, np.ndarray]]  # of each row, [T+1, ...]


@functools.cache
def play(
    family: str, precision: int, steps: int, rows: int, reach: float = 1.2, as_native: bool = False
) -> Play:
    """Plays random actions up to `reach`, so that some are clipped.

    Args:
        family, precision, steps, rows, reach: what is played.
        as_native: contacts are found as native MuJoCo finds them, see `contacts_as_native`.
    """
    body = BODIES[family]
    contacts = contacts_as_native() if as_native else contextlib.nullcontext()
    with contacts, jax.enable_x64(precision == 64), jax.numpy_rank_promotion("allow"):
        env = envs.make(family, "mjx")
        task = env.sample_tasks(jax.random.key(0), rows)
        if family == "walker_params":  # the first body is as built
            task = jax.tree.map(lambda x: x.at[0].set(1.0), task)
        actions = np.random.default_rng(0).uniform(-reach, reach, (steps, rows, env.action_size))

        @jax.jit
        def run(keys, task, actions):
            def step(states, action):
                states = jax.vmap(env.step)(states, action)
                return states, states

            first = jax.vmap(env.reset)(keys, task)
            after = jax.lax.scan(step, first, actions)[1]
            return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, after)

        keys = jax.random.split(jax.random.key(1), rows)
        actions = actions.astype(f"f{precision // 8}")
        states = run(keys, task, jnp.asarray(actions))
        assert states.observation.dtype == actions.dtype
        assert states.reward.dtype == actions.dtype
        task, observation = jax.tree.map(np.asarray, (task, states.observation))
        q, qd = np.asarray(states.physics.q[0]), np.asarray(states.physics.qd[0])

    native = []
    for row in range(rows):
        scales = {name: leaf[row] for name, leaf in task.items()}
        model = native_model(body, scales if family == "walker_params" else None)
        native.append(native_play(model, body, q[row], qd[row], actions[:, row]))
    reward = np.asarray(states.reward[1:])
    return Play(family, env, task, actions, states.physics, observation, reward, native)


def errors(played: Play) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far observations [T+1, rows] and rewards [T, rows] are from native ones."""
    observation, reward = [], []
    for row, seen in enumerate(played.native):
        task = {name: leaf[row].astype(float) for name, leaf in played.task.items()}
        expected = native_observation(played.family, seen)
        observation.append(np.abs(played.observation[:, row] - expected).max(-1))
        actions = played.actions[:, row].astype(float)
        expected = native_reward(played.family, seen, actions, task)
        reward.append(np.abs(played.reward[:, row] - expected))
    return np.stack(observation, 1), np.stack(reward, 1)


@pytest.mark.parametrize(
    ("family", "precision", "steps", "rows", "reach", "tolerance"),
    [
        # Gentle pushes: under hard ones native MuJoCo itself turns 1e-15 into 1e-5, see above.
        ("cheetah_vel", 64, 50, 4, 0.4, 1e-9),
        ("walker_params", 64, 50, 4, 1.2, 1e-9),  # the first body as built, three scaled
        ("cheetah_vel", 32, 10, 2, 1.2, 1e-3),
        ("walker_params", 32, 10, 2, 1.2, 1e-3),
    ],
)
def test_observation_and_reward_are_those_of_native_mujoco(
    family, precision, steps, rows, reach, tolerance
):
    played = play(family, precision, steps, rows, reach)
    observation, reward = errors(played)
    assert observation.max() < tolerance
    assert reward.max() < tolerance
    # And it was a play: what was compared moved, and by itself in each row.
    assert (np.abs(played.observation[-1] - played.observation[0]).max(-1) > 0.1).all()
    assert np.ptp(played.reward, axis=1).min() > 1e-3


def test_cheetah_dir_is_that_of_native_mujoco():
    """The other family of a body differs in the task: no need to compile its physics again."""
    same_body(play("cheetah_vel", 64, 50, 4, 0.4), "cheetah_dir", 1e-9, slice(None))


def test_ant_goal_is_that_of_native_mujoco():
    same_body(play(*ANT_PLAY), "ant_goal", 1e-9, slice(0, 1))  # one step: none is upright yet


def same_body(played: Play, family: str, tolerance: float, steps: slice) -> None:
    """Compares another family, task by task, on physics that were played."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        env = envs.make(family, "mjx")
        task = env.sample_tasks(jax.random.key(0), len(played.native))
        before = jax.tree.map(lambda x: x[:-1], played.physics)
        after = jax.tree.map(lambda x: x[1:], played.physics)
        actions = jnp.clip(jnp.asarray(played.actions), -1, 1)
        reward = jax.vmap(jax.vmap(env.reward), (0, 0, 0, None))(before, after, actions, task)
        observation = jax.vmap(jax.vmap(env.observe), (0, None))(played.physics, task)
        other = dataclasses.replace(
            played,
            family=family,
            task=jax.tree.map(np.asarray, task),
            observation=np.asarray(observation),
            reward=np.asarray(reward),
        )
    observation, reward = errors(other)
    assert observation[steps].max() < tolerance
    assert reward[steps].max() < tolerance


# --- Single tasks, against Gymnasium's own environments.

# Their names there, and on what they are played: families of a body share its physics.
SINGLE = {
    "half_cheetah": ("HalfCheetah-v4", ("cheetah_vel", 64, 50, 4, 0.4)),
    "hopper": ("Hopper-v4", ("hopper", 64, 50, 4, 1.2, True)),
    "walker2d": ("Walker2d-v4", ("walker2d", 64, 50, 4, 1.2, True)),
    "ant": ("Ant-v4", ("ant_dir", 64, 30, 4, 1.2, True)),
    "humanoid": ("Humanoid-v4", ("humanoid_dir", 64, 30, 4, 1.2, True)),
}


def gymnasium_play(name, qpos, qvel, actions):
    """Plays actions [T, A] in [-1, 1]; returns observations [T+1], rewards and ends [T]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a version 5
        env = gymnasium.make(name).unwrapped
    env.model.opt.solver, env.model.opt.tolerance = mujoco.mjtSolver.mjSOL_NEWTON, 1e-14
    env.set_state(qpos, qvel)
    low, high = env.model.actuator_ctrlrange.T
    seen, earned, ended = [env._get_obs()], [], []
    for action in np.clip(actions, -1, 1):
        observation, reward, terminated, *_ = env.step(low + (action + 1) / 2 * (high - low))
        seen.append(observation)
        earned.append(reward)
        ended.append(terminated)
    return np.array(seen), np.array(earned), np.array(ended)


@pytest.mark.parametrize("family", SINGLE)
def test_single_tasks_are_those_of_gymnasium(family):
    """But that the humanoid's contact forces, the last 84 that it sees, are zeros."""
    name, what = SINGLE[family]
    played = play(*what)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        env = envs.make(family, "mjx")
        assert env.episode_length == gymnasium.spec(name).max_episode_steps
        task = env.sample_tasks(jax.random.key(0), len(played.native))
        before, after = (
            jax.tree.map(lambda x, cut=cut: x[cut], played.physics)
            for cut in (slice(-1), slice(1, None))
        )
        actions = jnp.clip(jnp.asarray(played.actions), -1, 1)
        reward = jax.vmap(jax.vmap(env.reward), (0, 0, 0, None))(before, after, actions, task)
        observation = jax.vmap(jax.vmap(env.observe), (0, None))(played.physics, task)
        unhealthy = jax.vmap(jax.vmap(env.unhealthy))(after)
    compared = slice(0, -84 if family == "humanoid" else None)
    ends = 0
    for row in range(len(played.native)):
        start = (np.asarray(x[0, row]) for x in (played.physics.q, played.physics.qd))
        seen, earned, ended = gymnasium_play(name, *start, played.actions[:, row].astype(float))
        assert observation[:, row].shape == seen.shape
        np.testing.assert_allclose(
            observation[:, row, compared], seen[:, compared], rtol=0, atol=1e-8
        )
        np.testing.assert_allclose(reward[:, row], earned, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(unhealthy[:, row], ended)
        ends += ended.any()
    assert (ends > 0) == (family not in ("half_cheetah", "ant"))


# --- MJX finds contacts otherwise than native MuJoCo in two ways: it adds 1e-6 to denominators of
# nearest points, and turns the friction of limbs that stand upright on the floor. These are native
# MuJoCo's forms, but for exactly parallel and exactly vertical limbs.


def nearest_to_point(a: jax.Array, b: jax.Array, point: jax.Array) -> jax.Array:
    """Returns the point of the segment a-b nearest to a point, [3]."""
    way = b - a
    return a + jnp.clip((point - a) @ way / (way @ way), 0, 1) * way


def nearest_to_segment(
    a0: jax.Array, a1: jax.Array, b0: jax.Array, b1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the nearest points of two segments, [3] each."""
    a, b, gap = a1 - a0, b1 - b0, a0 - b0
    across = (a @ a) * (b @ b) - (a @ b) ** 2
    on_a = jnp.clip(((a @ b) * (b @ gap) - (b @ b) * (a @ gap)) / across, 0, 1)
    on_b = jnp.clip(((a @ b) * on_a + b @ gap) / (b @ b), 0, 1)
    on_a = jnp.clip(((a @ b) * on_b - a @ gap) / (a @ a), 0, 1)
    return a0 + on_a * a, b0 + on_b * b


@collision_primitive.collider(ncon=2)
def plane_and_capsule(plane, capsule):
    """Two contacts, with friction along the capsule, however upright it stands."""
    normal, axis = plane.mat[:, 2], capsule.mat[:, 2]
    along = axis - normal * (normal @ axis)
    along = along / jnp.linalg.norm(along)
    frame = jnp.stack([normal, along, jnp.cross(normal, along)])
    ends = capsule.pos + jnp.outer(jnp.array([1.0, -1.0]), axis * capsule.size[1])
    distance = (ends - plane.pos) @ normal - capsule.size[0]
    middle = ends - jnp.outer(capsule.size[0] + distance / 2, normal)
    return distance, middle, jnp.stack([frame, frame])


@contextlib.contextmanager
def contacts_as_native():
    geoms = mujoco.mjx._src.types.GeomType
    pair = (geoms.PLANE, geoms.CAPSULE)
    with (
        mock.patch.object(mjx_math, "closest_segment_point", nearest_to_point),
        mock.patch.object(mjx_math, "closest_segment_to_segment_points", nearest_to_segment),
        mock.patch.dict(collision_driver._COLLISION_FUNC, {pair: plane_and_capsule}),
    ):
        yield


@pytest.mark.parametrize("family", ["ant_dir", "humanoid_dir"])
def test_ant_and_humanoid_are_those_of_native_mujoco_but_for_how_contacts_are_found(family):
    """That it matters how they are found, the tests below show of both as they are run."""
    played = play(family, 64, 30, 4, as_native=True)
    observation, reward = errors(played)
    assert observation.max() < 1e-9
    assert reward.max() < 1e-9
    assert (np.abs(played.observation[-1] - played.observation[0]).max(-1) > 1).all()


def test_humanoid_as_it_is_run_is_that_of_native_mujoco_for_a_while():
    played = play("humanoid_dir", 32, 30, 4)
    observation, reward = errors(played)
    assert observation[:11].max() < 1e-3
    assert reward[:10].max() < 1e-3
    # Later an upright limb touches the floor, and limbs each other.
    assert all(seen["limbs"].any() for seen in played.native)
    assert 1e-3 < observation.max() < 1


# --- Ant as it is run agrees until a leg that stands nearly upright touches the floor: MJX lays
# friction along a capsule only where its shadow on the floor is at least half as long as itself.

UPRIGHT = 3**0.5 / 2  # of the axis of a leg: its shadow on the ground is half as long
ANT_PLAY = ("ant_dir", 64, 12, 32, 1.0)


def contacts(row: int) -> tuple[int, int]:
    """Returns the native steps at which ant first touches the ground, and first with a leg upright
    and so near the ground that a stage within the step may touch it.
    """
    played = play(*ANT_PLAY)
    model, early = native_model(ANT), native_model(ANT)
    early.geom_margin[0] += 0.02  # tells of contacts 2 cm early
    data, near = mujoco.MjData(model), mujoco.MjData(early)
    seen = played.native[row]
    data.qpos[:], data.qvel[:] = seen["qpos"][0], seen["qvel"][0]
    mujoco.mj_forward(model, data)
    touching = upright = len(played.actions)
    for i, action in enumerate(played.actions[:, row]):
        data.ctrl[:] = action
        for _ in range(ANT.substeps):
            mujoco.mj_step(model, data)
            near.qpos[:] = data.qpos
            mujoco.mj_forward(early, near)
            if data.ncon:
                touching = min(touching, i)
            if (np.abs(near.geom_xmat[near.contact.geom[:, 1], 8]) > UPRIGHT).any():
                upright = min(upright, i)
    return touching, upright


def test_ant_is_that_of_native_mujoco_until_a_leg_stands_upright_on_the_ground():
    played = play(*ANT_PLAY)
    observation, reward = errors(played)
    on_ground = compared = 0
    for row in range(len(played.native)):
        touching, upright = contacts(row)
        assert observation[: upright + 1, row].max() < 1e-9
        assert reward[:upright, row].max(initial=0.0) < 1e-9
        on_ground += max(upright - touching, 0)
        compared += upright
    assert compared > 40  # steps, of all rows
    assert on_ground > 2
    assert observation.max() > 0.1  # and then no longer


def test_ant_goes_on_as_native_mujoco_in_the_mean():
    played = play(*ANT_PLAY)
    qpos, qvel = np.asarray(played.physics.q), np.asarray(played.physics.qd)
    rows = range(len(played.native))
    task = {name: leaf.astype(float) for name, leaf in played.task.items()}
    ours = {
        "height": qpos[-1, :, 2],
        "way": np.linalg.norm(qpos[-1, :, :2] - qpos[0, :, :2], axis=-1),
        "speed": np.abs(qvel[-5:]).mean((0, 2)),
        "reward": played.reward.mean(0),
    }
    native = {
        "height": [s["qpos"][-1, 2] for s in played.native],
        "way": [np.linalg.norm(s["qpos"][-1, :2] - s["qpos"][0, :2]) for s in played.native],
        "speed": [np.abs(s["qvel"][-5:]).mean() for s in played.native],
        "reward": [
            native_reward(
                "ant_dir", played.native[row], played.actions[:, row], {"angle": task["angle"][row]}
            ).mean()
            for row in rows
        ],
    }
    for name, values in ours.items():
        difference = values - np.array(native[name])
        error = difference.std() / len(difference) ** 0.5
        assert 0 < error < 0.05 * np.abs(values).mean() + 0.05, name  # precise enough to say so
        assert abs(difference.mean()) < 4 * error, name


# --- A model of one's own, with boxes, one of which is free and is not the root.

CRATE = """
<mujoco>
  <worldbody>
    <geom type="box" size=".5 .4 .05" pos="0 0 .3" contype="0" conaffinity="0"/>
    <body name="cart" pos="0 0 1">
      <joint name="x" type="slide" axis="1 0 0" damping="1" frictionloss="{friction}"/>
      <geom type="capsule" size=".05 .2" contype="0" conaffinity="0"/>
    </body>
    <body name="box" pos="1 0 2">
      <freejoint/>
      <geom type="box" size=".1 .2 .3" pos=".05 0 0" quat="1 .2 0 0" contype="0" conaffinity="0"/>
    </body>
  </worldbody>
  <actuator><motor joint="x" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


class Crate(Body):
    """A cart that is pushed, and a box that falls and turns."""

    worst_reward = -1.0
    engines: ClassVar = {"mjx": Engine(timestep=0.01, substeps=5)}

    def draw_task(self, key, ranges):
        return {}

    def observe(self, physics, task):
        return jnp.concatenate([self.position(physics), self.velocity(physics)])

    def reward(self, before, after, action, task):
        return self.torso(after)[0]


@pytest.mark.parametrize("friction", [0.0, 2.0])  # of the cart's joint: MJX's own solver has it
def test_a_free_box_of_a_model_of_ones_own_is_that_of_native_mujoco(
    friction, tmp_path, monkeypatch, rank_promotion
):
    path = tmp_path / "crate.xml"
    path.write_text(CRATE.format(friction=friction))
    env = type("Here", (Crate,), {"model": path})("mjx")
    assert solves(env._system) == (not friction)
    assert (env.backends, env.action_size) == (("mjx",), 1)
    with monkeypatch.context() as patch:  # what is drawn: MJX would normalise it too
        patch.setattr(env._pipeline, "init", lambda system, q, qd: q)
        patch.setattr(env, "_finish_reset", lambda q: q)
        drawn = np.asarray(env.start(jax.random.key(0), {}))
    np.testing.assert_allclose(np.linalg.norm(drawn[4:8]), 1.0, atol=1e-6)
    assert np.abs(drawn[5:8]).min() > 0.01  # it begins at an angle

    @jax.jit
    def run(key):
        def step(state, _):
            state = env.step(state, jnp.ones(1))
            return state, (state.observation, env.shapes(state.physics, state.task))

        first = env.reset(key, {})
        return first.observation, jax.lax.scan(step, first, None, length=5)[1]

    first, (observation, shapes) = jax.tree.map(np.asarray, run(jax.random.key(0)))
    model = mujoco.MjModel.from_xml_path(str(path))
    model.opt.timestep = 0.01
    data = mujoco.MjData(model)
    data.qpos, data.qvel = np.split(first, [model.nq])
    data.ctrl = 1.0
    for seen, ends, corners in zip(observation, shapes.ends, shapes.corners, strict=True):
        mujoco.mj_step(model, data, 5)
        np.testing.assert_allclose(seen, np.concatenate([data.qpos, data.qvel]), atol=1e-5)
        axes = data.geom_xmat.reshape(-1, 3, 3)
        table, rod, box = range(3)
        axis = 0.2 * axes[rod, :, 2]
        np.testing.assert_allclose(ends[0], data.geom_xpos[rod] + [-axis, axis], atol=1e-5)
        for i, geom in enumerate((table, box)):
            signs = np.array(list(itertools.product((-1, 1), repeat=3)))
            expected = data.geom_xpos[geom] + signs * model.geom_size[geom] @ axes[geom].T
            np.testing.assert_allclose(corners[i], expected, atol=1e-5)
    assert np.abs(observation[-1] - first).max() > 0.3


def test_elliptic_cones_are_left_to_the_solver_of_mjx(tmp_path):
    path = tmp_path / "crate.xml"
    option = '<mujoco><option cone="elliptic"/>'
    path.write_text(CRATE.format(friction=0.0).replace("<mujoco>", option))
    assert not solves(type("Here", (Crate,), {"model": path})("mjx")._system)


@pytest.mark.parametrize("friction", [0.0, 2.0])  # our rows and solver, and MJX's
def test_products_of_physics_have_all_bits_of_float32_on_every_device(
    friction, tmp_path, rank_promotion
):
    path = tmp_path / "crate.xml"
    limited = CRATE.replace('axis="1 0 0"', 'axis="1 0 0" range="-9 9"')
    path.write_text(limited.format(friction=friction))
    env = type("Here", (Crate,), {"model": path})("mjx")
    state = jax.eval_shape(env.reset, jax.random.key(0), {})
    step = jax.jit(env.step).lower(state, jax.ShapeDtypeStruct((1,), jnp.float32))
    for lowered in (step, jax.jit(env.reset).lower(jax.random.key(0), {})):
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert products
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_actuators_with_a_state_are_refused_where_they_would_stand_still(tmp_path):
    path = tmp_path / "crate.xml"
    motor = '<general joint="x" dyntype="filter" dynprm="1" gainprm="10"/>'
    path.write_text(re.sub("<motor.*/>(?=</act)", motor, CRATE.format(friction=0.0)))
    slow = {"mjx": Engine(timestep=0.01, substeps=5, runge_kutta=True)}
    assert type("Here", (Crate,), {"model": path})("mjx").action_size == 1
    with pytest.raises(ValueError, match="need runge_kutta=False"):
        type("Here", (Crate,), {"model": path, "engines": slow})("mjx")


# --- How many contacts are kept.


@pytest.mark.parametrize(
    "family", ["cheetah_dir", "ant_dir", "humanoid_dir", "walker_params", "hopper", "walker2d"]
)
def test_bodies_never_have_more_contacts_than_are_kept(family, rank_promotion):
    body, kept = BODIES[family], envs.load(family).engines["mjx"].contacts
    model, random = native_model(body), np.random.default_rng(0)
    data, (low, high) = mujoco.MjData(model), model.actuator_ctrlrange.T
    most = dict.fromkeys((1, 3), 0)  # by dimension: those with friction count apart
    for step in range(4000):
        if step % 100 == 0:  # also of bodies that have fallen
            mujoco.mj_resetData(model, data)
        if step % 4 == 0:
            data.ctrl[:] = np.where(random.random(model.nu) < 0.5, low, high)
        mujoco.mj_step(model, data, body.substeps)
        for dimension in most:
            most[dimension] = max(most[dimension], (data.contact.dim == dimension).sum())
    assert 1 < max(most.values()) <= kept, most
    kinds = 2 if most[1] else 1
    env = envs.make(family, "mjx")
    tasks = env.sample_tasks(jax.random.key(1), 1)
    state = jax.eval_shape(env.reset, jax.random.key(0), jax.tree.map(lambda x: x[0], tasks))
    # Three pairs of a hopper's limbs can meet; others have more than are kept.
    limbs = min(kept, 3) if family == "hopper" else kept
    assert state.physics._impl.contact.dist.shape == (kept + (kinds - 1) * limbs,)


# --- Where an episode begins.


@pytest.mark.parametrize(
    "family", ["cheetah_vel", "ant_dir", "humanoid_dir", "walker_params", "hopper"]
)
def test_an_episode_begins_as_gymnasiums_does(family, monkeypatch, rank_promotion):
    body, env = BODIES[family], envs.make(family, "mjx")
    model = native_model(body)
    # What is drawn, without compiling what follows from it; `play` runs the whole of a reset.
    monkeypatch.setattr(env._pipeline, "init", lambda system, q, qd: (q, qd))
    monkeypatch.setattr(env, "_finish_reset", lambda drawn: drawn)
    keys = jax.random.split(jax.random.key(3), 1000)
    tasks = env.sample_tasks(jax.random.key(4), 1000)
    offset, velocity = map(np.asarray, jax.vmap(env.start)(keys, tasks))
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        np.testing.assert_allclose(np.linalg.norm(offset[:, 3:7], axis=-1), 1.0, atol=1e-6)
        offset, rest = (np.delete(x, range(3, 7), axis=-1) for x in (offset, model.qpos0))
    else:
        rest = model.qpos0
    offset = offset - rest
    assert 0.99 * body.reset < np.abs(offset).max() < body.reset + 1e-6
    np.testing.assert_allclose(offset.std(0), body.reset / 3**0.5, rtol=0.1)
    if body.reset == 0.1:
        np.testing.assert_allclose(velocity.std(0), 0.1, rtol=0.1)
        assert np.abs(velocity).max() > 0.3  # normal
    else:
        np.testing.assert_allclose(velocity.std(0), body.reset / 3**0.5, rtol=0.1)
        assert 0.99 * body.reset < np.abs(velocity).max() <= body.reset
    assert abs(np.corrcoef(offset[:, 0], velocity[:, 0])[0, 1]) < 0.15
