"""Environments: rewards, ends, resets, tasks, and what a user of `make` sees."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import probes
from envs.base import Environment, EnvState
from envs.point import PointGoal

ROOT = pathlib.Path(__file__).parent.parent
STEPS, ROWS, RESETS = 203, 4, 400
# Physics takes long to compile and is run once here.
QUICK = {"xla_backend_optimization_level": 0}
# family: observation size, action size
PHYSICS = {"cheetah_dir": (20, 6), "cheetah_vel": (20, 6), "ant_dir": (27, 8), "ant_goal": (29, 8)}


@dataclasses.dataclass
class Play:
    """An environment on its physics, compiled once, and a long play of random actions."""

    env: Environment
    resets: EnvState  # [RESETS] of one task after another
    start: EnvState  # the first [ROWS] of them
    run: object  # (states [ROWS], actions [STEPS, ROWS, A]) -> states after each step, thinned
    actions: np.ndarray  # [STEPS, ROWS, A]
    trace: dict[str, np.ndarray]  # [STEPS, ROWS, ...]


@functools.cache
def play(family: str) -> Play:
    """Plays random actions on spring, beyond the time limit, whatever happens."""
    env = envs.make(family, "spring")
    tasks = env.sample_tasks(jax.random.key(0), RESETS)

    def thin(state: EnvState) -> dict[str, jax.Array]:
        physics = state.physics
        kept = {"q": physics.q, "qd": physics.qd, "torso": physics.x.pos[:, 0]}
        names = ("observation", "reward", "terminated", "truncated", "step", "blew_up")
        return kept | {name: getattr(state, name) for name in names}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(states: EnvState, actions: jax.Array) -> dict[str, jax.Array]:
        def step(states: EnvState, action: jax.Array) -> tuple[EnvState, dict[str, jax.Array]]:
            states = jax.vmap(env.step)(states, action)
            return states, thin(states)

        return jax.lax.scan(step, states, actions)[1]

    with jax.numpy_rank_promotion("allow"):
        keys = jax.random.split(jax.random.key(1), RESETS)
        resets = jax.jit(jax.vmap(env.reset), compiler_options=QUICK)(keys, tasks)
        start = jax.tree.map(lambda x: x[:ROWS], resets)
        actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, ROWS, env.action_size))
        actions = actions.astype(np.float32)
        trace = jax.tree.map(np.asarray, run(start, actions))
    return Play(env, resets, start, run, actions, trace)


def successive(played: Play, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a quantity of the physics before and after each step."""
    physics = played.start.physics
    first = {"q": physics.q, "qd": physics.qd, "torso": physics.x.pos[:, 0]}[name]
    after = played.trace[name]
    return np.concatenate([np.asarray(first)[None], after[:-1]]), after


@pytest.mark.parametrize("family", PHYSICS)
def test_physics_stays_finite_and_sizes_are_those_of_the_benchmark(family):
    played = play(family)
    observation_size, action_size = PHYSICS[family]
    assert played.env.observation_size == observation_size
    assert played.env.action_size == action_size
    assert played.start.observation.shape == (ROWS, observation_size)
    assert played.trace["observation"].shape == (STEPS, ROWS, observation_size)
    for name, value in played.trace.items():
        assert np.isfinite(value).all(), name
    assert played.trace["observation"].dtype == np.float32


def test_cheetah_dir_reward():
    played = play("cheetah_dir")
    before, after = successive(played, "q")
    speed = (after[..., 0] - before[..., 0]) / 0.05
    direction = np.array([-1.0, 1.0, -1.0, 1.0])
    expected = direction * speed - 0.05 * (played.actions**2).sum(-1)
    np.testing.assert_allclose(played.trace["reward"], expected, atol=2e-4)
    assert np.abs(speed).max() > 0.5


def test_cheetah_vel_reward():
    played = play("cheetah_vel")
    before, after = successive(played, "q")
    speed = (after[..., 0] - before[..., 0]) / 0.05
    wanted = np.asarray(played.start.task["velocity"])
    assert len(np.unique(wanted)) == ROWS
    expected = -np.abs(speed - wanted) - 0.05 * (played.actions**2).sum(-1)
    np.testing.assert_allclose(played.trace["reward"], expected, atol=2e-4)


def test_ant_dir_reward():
    played = play("ant_dir")
    before, after = successive(played, "torso")
    velocity = (after - before)[..., 0] / 0.05
    sign = np.array([1.0, -1.0, 1.0, -1.0])  # angles 0 and pi
    expected = sign * velocity - 0.5 * (played.actions**2).sum(-1) + 1.0
    np.testing.assert_allclose(played.trace["reward"], expected, atol=2e-4)
    assert np.abs(velocity).max() > 0.5


def test_ant_goal_reward():
    played = play("ant_goal")
    _, after = successive(played, "torso")
    goal = np.asarray(played.start.task["goal"])
    assert goal.shape == (ROWS, 2)
    distance = np.abs(after[..., :2] - goal).sum(-1)
    expected = -distance - 0.1 * (played.actions**2).sum(-1)
    np.testing.assert_allclose(played.trace["reward"], expected, atol=2e-4)


@pytest.mark.parametrize("family", PHYSICS)
def test_observation_is_made_of_positions_velocities_and_torso(family):
    trace = play(family).trace
    q, qd, torso = trace["q"], trace["qd"], trace["torso"]
    parts = {
        "cheetah_dir": (q[..., 1:], qd, torso),
        "cheetah_vel": (q[..., 1:], qd, torso),
        "ant_dir": (q[..., 2:], qd),
        "ant_goal": (q, qd),
    }[family]
    np.testing.assert_array_equal(trace["observation"], np.concatenate(parts, -1))


@pytest.mark.parametrize("family", PHYSICS)
def test_physics_ends_at_200_steps_or_where_the_family_says(family):
    trace = play(family).trace
    height = trace["torso"][..., 2]
    ends = family == "ant_dir"
    expected = ((height < 0.2) | (height > 1.0)) & ends
    np.testing.assert_array_equal(trace["terminated"], expected)
    steps = np.broadcast_to(np.arange(1, STEPS + 1)[:, None], expected.shape)
    np.testing.assert_array_equal(trace["step"], steps)
    np.testing.assert_array_equal(trace["truncated"], (steps >= 200) & ~expected)
    assert trace["truncated"][199].any()


@pytest.mark.parametrize("family", ["cheetah_vel", "ant_dir"])
def test_physics_clips_actions(family):
    played = play(family)
    with jax.numpy_rank_promotion("allow"):
        outside = played.run(played.start, 3 * played.actions)
        edge = played.run(played.start, np.clip(3 * played.actions, -1, 1))
    for name in outside:
        np.testing.assert_array_equal(outside[name], edge[name], err_msg=name)
    assert not np.array_equal(outside["q"], played.trace["q"])


def lifted(states: EnvState, by: float) -> EnvState:
    """Returns the states with every body moved up (m)."""
    physics = states.physics
    up = jnp.array([0.0, 0.0, by])[None, None]
    return states.replace(
        physics=physics.replace(
            q=physics.q.at[:, 2].add(by),
            x=physics.x.replace(pos=physics.x.pos + up),
            x_i=physics.x_i.replace(pos=physics.x_i.pos + up),
        )
    )


@pytest.mark.parametrize(("family", "ends"), [("ant_dir", True), ("ant_goal", False)])
def test_ant_dir_ends_when_the_torso_is_too_high_and_ant_goal_does_not(family, ends):
    played = play(family)
    with jax.numpy_rank_promotion("allow"):
        after = played.run(lifted(played.start, 0.8), np.zeros_like(played.actions))
    assert (np.asarray(after["torso"])[0, :, 2] > 1.2).all()  # as was meant
    assert (np.asarray(after["terminated"])[0] == ends).all()
    assert np.asarray(after["truncated"])[0].sum() == 0


@pytest.mark.parametrize(
    ("height", "ends"), [(0.19, True), (0.21, False), (0.75, False), (0.99, False), (1.01, True)]
)
def test_ant_dir_is_healthy_between_its_bounds(height, ends):
    for family in ("ant_dir", "ant_goal"):
        played = play(family)
        physics = jax.tree.map(lambda x: x[0], played.start.physics)
        physics = physics.replace(q=physics.q.at[2].set(height))
        assert bool(played.env.unhealthy(physics)) == (ends and family == "ant_dir")


@pytest.mark.parametrize("family", ["cheetah_vel", "ant_goal"])
def test_physics_that_is_not_finite_ends_the_episode(family):
    played = play(family)
    broken = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        played.start.physics,
    )
    with jax.numpy_rank_promotion("allow"):
        after = played.run(played.start.replace(physics=broken), played.actions)
    assert np.asarray(after["blew_up"]).all()
    assert not played.trace["blew_up"].any()
    assert np.asarray(after["truncated"]).all()
    assert not np.asarray(after["terminated"]).any()
    assert np.isfinite(after["observation"]).all()
    np.testing.assert_array_equal(after["reward"], played.env.worst_reward)


@pytest.mark.parametrize("family", PHYSICS)
def test_reset_distribution(family):
    played = play(family)
    physics = played.resets.physics
    q, qd = np.asarray(physics.q), np.asarray(physics.qd)
    offset = q - np.asarray(played.env._system.init_q)
    if family.startswith("ant"):
        np.testing.assert_allclose(np.linalg.norm(q[:, 3:7], axis=-1), 1.0, atol=1e-5)
        offset = np.delete(offset, range(3, 7), axis=1)  # the orientation is normalised
        assert 0.02 < np.abs(q[:, 4:7]).mean() < 0.08
    assert np.abs(offset).max() <= 0.1 + 1e-5
    np.testing.assert_allclose(offset.mean(0), 0.0, atol=0.012)
    np.testing.assert_allclose(offset.std(0), 0.2 / 12**0.5, rtol=0.1)
    np.testing.assert_allclose(qd.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose(qd.std(0), 0.1, rtol=0.15)
    assert np.abs(qd).max() > 0.25  # normal, not uniform
    for flag in (played.resets.terminated, played.resets.truncated, played.resets.step):
        assert not np.asarray(flag).any()


# For mjx see test_parity.
@pytest.mark.parametrize("backend", ["positional", "generalized"])
@pytest.mark.parametrize("family", ["cheetah_vel", "ant_dir"])
def test_every_backend_steps(family, backend, rank_promotion):
    env = envs.make(family, backend)
    tasks = env.sample_tasks(jax.random.key(0), 2)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def reset_and_step(keys, tasks, action):
        states = jax.vmap(env.reset)(keys, tasks)
        return states, jax.vmap(env.step)(states, action)

    keys = jax.random.split(jax.random.key(1), 2)
    before, after = reset_and_step(keys, tasks, jnp.ones((2, env.action_size)))
    assert after.observation.shape == (2, PHYSICS[family][0])
    assert np.isfinite(after.observation).all()
    assert np.isfinite(after.reward).all()
    assert not np.asarray(after.terminated).any()
    np.testing.assert_array_equal(after.step, [1, 1])
    # A full push moves a body within 0.05 s, and not out of the world.
    moved = np.abs(np.asarray(after.observation - before.observation)).max(-1)
    assert (moved > 0.1).all()
    assert (moved < 50).all()


# --- What does not need physics: the point robot and the probes.


def walk(env: Environment, task: dict[str, jax.Array], actions: jax.Array) -> EnvState:
    """Returns the states [T] after each action [T, A] of one episode."""

    def step(state: EnvState, action: jax.Array) -> tuple[EnvState, EnvState]:
        state = env.step(state, action)
        return state, state

    return jax.lax.scan(step, env.reset(jax.random.key(0), task), actions)[1]


@pytest.mark.parametrize("family", ["point_goal", "point_sparse"])
def test_point_rewards(family):
    env = envs.make(family)
    assert (env.observation_size, env.action_size) == (2, 2)
    goal = np.array([0.6, 0.8], np.float32)
    start = env.reset(jax.random.key(0), {"goal": jnp.asarray(goal)}).observation
    # Noisily to the goal and beyond.
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, (30, 2))
    actions = (np.linspace(1.0, 0.0, 30)[:, None] * goal + noise).astype(np.float32)
    states = walk(env, {"goal": jnp.asarray(goal)}, jnp.asarray(actions))
    position = np.asarray(start) + 0.1 * np.cumsum(actions, 0)
    np.testing.assert_allclose(states.observation, position, atol=1e-5)
    distance = np.sqrt(((position - goal) ** 2).sum(-1))
    expected = -distance if family == "point_goal" else (distance <= 0.2).astype(np.float32)
    np.testing.assert_allclose(states.reward, expected, atol=1e-5)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("length", [200, 7])
def test_time_limit_is_exact(length):
    env = envs.make("point_goal", **({} if length == 200 else {"episode_length": length}))
    assert env.episode_length == length
    states = walk(env, {"goal": jnp.ones(2)}, jnp.zeros((length, 2)))
    np.testing.assert_array_equal(states.truncated, np.arange(1, length + 1) == length)
    np.testing.assert_array_equal(states.step, np.arange(1, length + 1))
    assert not np.asarray(states.terminated).any()


class Fragile(probes.Probe):
    """Task `steps`: how many leave the physics finite; what is seen of it is 1 / what is left."""

    def draw_task(self, key, ranges):
        return {"steps": jnp.ones(())}

    def observe(self, physics, task):
        return (1.0 / (task["steps"] + 1.0 - physics))[None]

    def reward(self, before, after, action, task):
        return after


def test_physics_that_blew_up_is_told_from_a_task_that_ended():
    env = Fragile(episode_length=9)
    states = walk(env, {"steps": jnp.array(2.0)}, jnp.zeros((4, 1)))
    np.testing.assert_array_equal(states.blew_up, [False, False, True, False])
    np.testing.assert_array_equal(states.truncated, [False, False, True, False])
    assert not np.asarray(states.terminated).any()
    np.testing.assert_allclose(states.observation[:3, 0], [1 / 2, 1.0, 1.0])  # the last finite one
    np.testing.assert_array_equal(states.reward, [1.0, 2.0, env.worst_reward, 4.0])
    assert not bool(env.reset(jax.random.key(0), {"steps": jnp.ones(())}).blew_up)
    ended = walk(probes.TwoStep(), {}, jnp.zeros((2, 1)))
    np.testing.assert_array_equal(ended.terminated, [False, True])
    assert not np.asarray(ended.blew_up).any()
    cut = walk(probes.Endless(episode_length=1), {}, jnp.zeros((1, 1)))
    assert bool(cut.truncated[0])
    assert not bool(cut.blew_up[0])


def test_an_end_at_the_time_limit_is_an_end_only():
    for length in (1, 2, 3):  # the task ends with the second step
        env = probes.TwoStep(episode_length=length)
        states = walk(env, {}, jnp.zeros((length, 1)))
        np.testing.assert_array_equal(states.terminated, np.arange(1, length + 1) >= 2)
        assert bool(states.truncated[0]) == (length == 1)
        assert not np.asarray(states.terminated & states.truncated).any()


def test_point_clips_actions():
    env = envs.make("point_goal")
    state = env.reset(jax.random.key(0), {"goal": jnp.ones(2)})
    outside = env.step(state, jnp.array([5.0, -1.5]))
    edge = env.step(state, jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(outside.observation, edge.observation)
    np.testing.assert_array_equal(outside.reward, edge.reward)


def test_clipping_reaches_the_reward():
    env = probes.HiddenBandit()
    state = env.reset(jax.random.key(0), {"goal": jnp.ones(())})
    assert float(env.step(state, jnp.array([7.0])).reward) == 1.0
    assert float(env.step(state, jnp.array([0.5])).reward) == 0.5


def test_resets_are_fresh_and_keep_the_task():
    env = envs.make("point_goal")
    task = {"goal": jnp.array([0.3, 0.4])}
    states = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(jax.random.key(0), 500), task)
    observation = np.asarray(states.observation)
    assert len(np.unique(observation[:, 0])) > 490
    assert np.abs(observation).max() <= 0.1
    np.testing.assert_allclose(observation.std(0), 0.2 / 12**0.5, rtol=0.1)
    np.testing.assert_array_equal(states.task["goal"], np.tile([[0.3, 0.4]], (500, 1)).astype("f4"))
    again = env.reset(jax.random.split(jax.random.key(0), 500)[3], task)
    np.testing.assert_array_equal(again.observation, observation[3])
    for flag in (states.terminated, states.truncated, states.step, states.reward):
        assert not np.asarray(flag).any()


def test_state_that_is_not_finite_ends_the_episode():
    env = PointGoal(episode_length=5)
    state = env.reset(jax.random.key(0), {"goal": jnp.ones(2)})
    for poison, step in ((jnp.nan, 0), (jnp.inf, 0), (jnp.nan, 4)):
        broken = state.replace(physics=state.physics.at[0].set(poison), step=jnp.int32(step))
        after = env.step(broken, jnp.zeros(2))
        assert bool(after.truncated)
        assert not bool(after.terminated)
        assert float(after.reward) == env.worst_reward
        np.testing.assert_array_equal(after.observation, state.observation)


@pytest.mark.parametrize("family", envs.FAMILIES)
def test_observe_task_appends_the_task(family, rank_promotion):
    plain, oracle = envs.make(family), envs.make(family, observe_task=True)
    task = plain.sample_task(jax.random.key(5))
    told = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(task)])
    assert oracle.observation_size == plain.observation_size + len(told)
    if plain.backends == ("none",):
        first = oracle.reset(jax.random.key(0), task)
        for state in (first, oracle.step(first, jnp.zeros(2))):
            np.testing.assert_array_equal(state.observation[2:], told)
            np.testing.assert_array_equal(state.observation[:2], state.physics)


# --- Draws of tasks.


def draw(family: str, num: int = 4000) -> np.ndarray:
    """Returns the only leaf of `num` tasks."""
    tasks = envs.make(family).sample_tasks(jax.random.key(0), num)
    assert len(tasks) == 1
    return np.asarray(next(iter(tasks.values())))


def largest_gap(sample: np.ndarray) -> float:
    """Returns the Kolmogorov-Smirnov distance of a sample from U[0, 1]."""
    sample = np.sort(sample)
    return np.abs(sample - np.arange(1, len(sample) + 1) / len(sample)).max()


def test_velocities_are_uniform():
    velocity = draw("cheetah_vel")
    assert velocity.shape == (4000,)
    assert velocity.min() >= 0
    assert velocity.max() <= 3
    assert largest_gap(velocity / 3) < 0.03


def test_ant_goals_are_uniform_in_a_disc():
    goal = draw("ant_goal")
    assert goal.shape == (4000, 2)
    square = (goal**2).sum(-1)
    assert square.max() <= 9 * (1 + 1e-6)
    np.testing.assert_allclose(square.mean(), 4.5, atol=0.15)
    assert largest_gap(square / 9) < 0.03
    assert largest_gap(np.arctan2(goal[:, 1], goal[:, 0]) / (2 * np.pi) + 0.5) < 0.03


@pytest.mark.parametrize("family", ["point_goal", "point_sparse"])
def test_point_goals_are_uniform_on_a_half_circle(family):
    goal = draw(family)
    np.testing.assert_allclose((goal**2).sum(-1), 1.0, atol=1e-5)
    assert goal[:, 1].min() >= -1e-6
    assert largest_gap(np.arctan2(goal[:, 1], goal[:, 0]) / np.pi) < 0.03


def test_humanoid_angles_are_uniform():
    angle = draw("humanoid_dir")
    assert angle.shape == (4000,)
    assert angle.min() >= 0
    assert largest_gap(angle / (2 * np.pi)) < 0.03


def test_walker_scales_are_independent_and_uniform_in_their_logarithm():
    env = envs.make("walker_params")
    tasks = {k: np.asarray(v) for k, v in env.sample_tasks(jax.random.key(0), 4000).items()}
    shapes = {"mass": (7,), "inertia": (7, 3), "damping": (9,), "friction": (8, 3)}
    assert {name: leaf.shape[1:] for name, leaf in tasks.items()} == shapes
    powers = []
    for name, leaf in tasks.items():
        power = np.log(leaf.reshape(4000, -1)) / np.log(1.3 if name == "damping" else 1.5)
        assert np.abs(power).max() <= 3 + 1e-5
        for column in power.T:
            assert largest_gap(column / 6 + 0.5) < 0.04
        powers.append(power)
    powers = np.concatenate(powers, 1)
    assert powers.shape == (4000, 61)
    correlation = np.corrcoef(powers, rowvar=False) - np.eye(61)
    assert np.abs(correlation).max() < 5 / 4000**0.5  # five standard errors


def test_walker_scales_reach_their_parameters_and_no_other():
    env = envs.make("walker_params")
    task = jax.tree.map(jnp.ones_like, env.sample_task(jax.random.key(0)))
    plain = env.system(task)
    parameters = ("body_mass", "body_inertia", "dof_damping", "geom_friction")
    derived = ("body_invweight0", "dof_invweight0", "body_subtreemass", "dof_M0")
    for leaf, parameter in zip(("mass", "inertia", "damping", "friction"), parameters, strict=True):
        factors = 1 + jnp.arange(task[leaf].size, dtype=float).reshape(task[leaf].shape) / 10
        scaled = env.system(task | {leaf: factors})
        for name in parameters:
            factor = np.asarray(factors) if name == parameter else 1.0
            rows = slice(1, None) if name.startswith("body") else slice(None)  # not the world
            expected = np.asarray(getattr(plain, name))[rows] * factor
            np.testing.assert_allclose(np.asarray(getattr(scaled, name))[rows], expected, rtol=1e-6)
        for name in derived:
            np.testing.assert_array_equal(getattr(scaled, name), getattr(plain, name))
    friction = np.asarray(plain.geom_friction)[:, 0]
    np.testing.assert_allclose(friction, [0.7, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.9], rtol=1e-6)


def healthy(family: str, q: list[float]) -> bool:
    """Returns whether a body whose first positions are `q` plays on."""
    env = envs.make(family)
    position = jnp.zeros(env._system.q_size()).at[: len(q)].set(jnp.array(q))
    return not env.unhealthy(types.SimpleNamespace(q=position))


@pytest.mark.parametrize(
    ("height", "pitch", "plays_on"),
    [
        (1.25, 0.0, True),
        (0.79, 0.0, False),
        (0.81, 0.0, True),
        (1.99, 0.0, True),
        (2.01, 0.0, False),
        (1.25, 0.99, True),
        (1.25, 1.01, False),
        (1.25, -1.01, False),
    ],
)
def test_walker_is_healthy_upright(height, pitch, plays_on):
    assert healthy("walker_params", [0.0, height, pitch]) == plays_on


@pytest.mark.parametrize(
    ("height", "plays_on"), [(0.99, False), (1.01, True), (1.99, True), (2.01, False)]
)
def test_humanoid_is_healthy_between_its_bounds(height, plays_on):
    assert healthy("humanoid_dir", [0.0, 0.0, height]) == plays_on


@pytest.mark.parametrize(
    ("family", "sizes"), [("humanoid_dir", (376, 17)), ("walker_params", (17, 6))]
)
def test_sizes_of_what_only_mjx_runs(family, sizes, rank_promotion):
    env = envs.make(family)
    assert (env.observation_size, env.action_size) == sizes
    with pytest.raises(ValueError, match=f"{family} does not run on backend 'spring'; .* on mjx"):
        envs.make(family, "spring")


@pytest.mark.parametrize(
    ("family", "both"), [("cheetah_dir", [-1.0, 1.0]), ("ant_dir", [0.0, np.pi])]
)
def test_directions_alternate(family, both):
    for num in (2, 5):
        np.testing.assert_allclose(draw(family, num), np.resize(both, num), rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 100)
    (single,) = jax.vmap(envs.make(family).sample_task)(keys).values()
    np.testing.assert_allclose(np.unique(single), both, rtol=1e-6)
    assert 30 < (np.asarray(single) == single[0]).sum() < 70


# --- The way in; see test_families too.


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'warp'.*spring, positional, generalized, mjx"):
        envs.make("ant_dir", "warp")
    with pytest.raises(ValueError, match=r"point_goal does not run on backend 'spring'.*none"):
        envs.make("point_goal", "spring")


def python(code: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_making_a_body_is_silent(tmp_path):
    # Importing MJX prints, and MuJoCo logs a warning of the cheetah's model to a file.
    code = """
import envs
envs.make("cheetah_vel", "spring").observation_size
envs.make("ant_goal", "mjx").observation_size
"""
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # no MUJOCO_LOG.TXT


# What of a task a range is about.
DRAWN = {
    "cheetah_vel": {"velocity": lambda task: task["velocity"]},
    "ant_goal": {
        "radius": lambda task: np.hypot(*task["goal"].T),
        "angle": lambda task: np.arctan2(task["goal"][:, 1], task["goal"][:, 0]) % (2 * np.pi),
    },
    "humanoid_dir": {"angle": lambda task: task["angle"]},
    "walker_params": {
        "exponent": lambda task: np.abs(np.log(task["mass"]) / np.log(1.5)).ravel(),
    },
    "point_goal": {"angle": lambda task: np.arctan2(task["goal"][:, 1], task["goal"][:, 0])},
}
DRAWN["point_sparse"] = DRAWN["point_goal"]


# The arm's kinds are counted: see tests/test_arm.py.
@pytest.mark.parametrize(
    "family", [x for x in envs.FAMILIES if envs.load(x).ranges and x != "arm_pick"]
)
def test_ranges_and_splits_of_continuous_families(family):
    env = envs.make(family)
    assert env.ranges.keys() == DRAWN[family].keys()
    some = {name: (low + 0.2, low + 0.7 * (high - low)) for name, (low, high) in env.ranges.items()}
    for ranges in (some, *(half for halves in env.splits.values() for half in halves)):
        tasks = env.sample_tasks(jax.random.key(0), 300, ranges)
        tasks = {name: np.asarray(leaf) for name, leaf in tasks.items()}
        for name, (low, high) in {**env.ranges, **ranges}.items():
            drawn, slack = DRAWN[family][name](tasks), 0.03 * (high - low)
            assert low - 1e-4 <= drawn.min() < low + 3 * slack + (0.3 if name == "radius" else 0)
            assert high - slack < drawn.max() <= high + 1e-4
