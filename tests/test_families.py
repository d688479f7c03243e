"""What every family says of itself, families from outside, and the page on how to add one."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.base import Environment
from envs.point import PointGoal
from envs.probes import Probe
from experiments import terminal

ROOT = pathlib.Path(__file__).parent.parent
# Families of one task, all in one file, whatever their bodies.
SINGLE = [name for name, path in envs.FAMILIES.items() if path.startswith("envs.single:")]
NO_ENGINE = [name for name in envs.FAMILIES if envs.load(name).backends == ("none",)]
PAGE = (ROOT / "docs/add_a_family.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the page's example; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "my_family.py").write_text(EXAMPLE)
    return tmp_path


# --- Every family.


@pytest.mark.parametrize("name", envs.FAMILIES)
def test_a_family_says_what_others_need_to_know(name):
    env = envs.make(name)
    tasks = env.sample_tasks(jax.random.key(0), 3)
    assert env.body
    named = {leaf for leaf, values in tasks.items() if values.size}  # a lone task has none
    assert env.parameters.keys() == named | env.ranges.keys()
    assert all(env.parameters.values())
    assert bool(named) == (name not in SINGLE)
    titles = terminal.task_names(env, tasks)
    assert all(1 <= len(title) <= 40 for title in titles)
    assert len(set(titles)) == 1 if name in SINGLE else len(set(titles)) >= 2
    assert (env.film is None) == (name in [*NO_ENGINE, "arm_pick"])  # which has its own picture
    if env.film is not None:
        assert env.caption
        for i in range(3):
            assert env.way(jax.tree.map(lambda x, i=i: x[i], tasks)).shape == (2,)


@pytest.mark.parametrize("name", envs.FAMILIES)
def test_ranges_are_within_their_limits(name):
    family = envs.load(name)
    halves = [half for pair in family.splits.values() for half in pair]
    for ranges in (family.ranges, *halves):
        assert ranges.keys() <= family.ranges.keys()
        for parameter, (low, high) in ranges.items():
            lowest, highest = family.limit(parameter)
            assert lowest <= low < high <= highest
    assert family.limits.keys() <= family.ranges.keys()
    for train, held_out in family.splits.values():
        (parameter,) = train
        (low, high), (lowest, highest) = train[parameter], held_out[parameter]
        assert high <= lowest or highest <= low  # they do not overlap


def test_families_of_one_body_are_those_of_one_file():
    """Single tasks have a file of their own; where the body is another file's, so is the model."""
    families = {x: path for x, path in envs.FAMILIES.items() if x not in SINGLE}
    files = {name: path.partition(":")[0] for name, path in families.items()}
    bodies = {name: envs.load(name).body for name in families}
    assert len(set(bodies.values())) == len(set(files.values()))
    assert len(set(zip(bodies.values(), files.values(), strict=True))) == len(set(files.values()))
    engines = [envs.load(name) for name in envs.FAMILIES if name not in NO_ENGINE]
    models = {(family.body, family.model) for family in engines}
    assert len(models) == len({body for body, _ in models}) == len({model for _, model in models})


@pytest.mark.parametrize("name", [*NO_ENGINE, "my_family:PointLine"])
def test_no_reward_is_below_the_worst(name, folder):
    """Of a body whose play is cheap: nor is one of the farthest that a point can walk."""
    env = envs.make(name)
    noise = np.random.default_rng(0).uniform(-1, 1, (200, env.action_size)).astype(np.float32)

    def play(key, actions):
        def step(state, action):
            after = env.step(state, action)
            bare = env.reward(state.physics, after.physics, action, state.task)
            return after, (after, bare)

        start_key, task_key = jax.random.split(key)
        return jax.lax.scan(step, env.reset(start_key, env.sample_task(task_key)), actions)[1]

    for actions in (noise, -jnp.ones_like(noise)):
        states, bare = jax.vmap(play, in_axes=(0, None))(
            jax.random.split(jax.random.key(0), 8), actions
        )
        assert float(bare.min()) >= env.worst_reward
        np.testing.assert_allclose(states.reward, bare, rtol=1e-5)
        assert states.extras == {}


def test_titles():
    def title(name, **task):
        return envs.load(name).title({k: np.float32(v) for k, v in task.items()})

    assert title("cheetah_dir", direction=-1) == "backward"
    assert title("cheetah_vel", velocity=1.25) == "1.25 m/s"
    assert title("ant_dir", angle=0) == "forward"
    assert title("ant_dir", angle=np.pi) == "backward"
    assert title("ant_goal", goal=[1, -2]) == "(1.0, -2.0) m"
    assert title("humanoid_dir", angle=np.pi / 2) == "90°"
    assert title("point_goal", goal=[-0.001, 1]) == "(0.00, 1.00)"
    assert title("walker_params", mass=[0.5, 1, 3]) == "masses × 0.5 to 3.0"
    assert Probe.title({"goal": np.float32([0.5, -1])}) == "goal +0.50, -1.00"
    assert len(Probe.title({"goal": np.zeros(99)})) == 40


# --- What a family reports beside the reward.


class Reporting(PointGoal):
    """Breaks where x is above 0.15; reports x, and its square root, which only a right half has."""

    def start(self, key, task):
        return jnp.zeros(2)

    def observe(self, physics, task):
        return jnp.where(physics[0] > 0.15, jnp.nan, physics)

    def extras(self, physics, task):
        return {"x": physics[0], "root": jnp.sqrt(physics[0] - 0.05), "right": physics[0] > 0}


def test_extras_are_of_the_last_state_that_is_finite():
    env = Reporting()
    state = env.reset(jax.random.key(0), {"goal": jnp.ones(2)})
    seen = [state]
    for x in (1.0, 1.0, -1.0):
        seen.append(jax.jit(env.step)(seen[-1], jnp.array([x, 0.0])))
    assert all(leaf.dtype == jnp.float32 for s in seen for leaf in s.extras.values())
    extras = {name: [float(s.extras[name]) for s in seen] for name in state.extras}
    assert [bool(s.blew_up) for s in seen] == [False, False, True, False]
    np.testing.assert_allclose(extras["x"], [0.0, 0.1, 0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(extras["root"], np.sqrt([0.0, 0.05, 0.05, 0.05]), atol=1e-6)
    np.testing.assert_array_equal(extras["right"], [0, 1, 1, 1])


# --- The way in.


def test_the_family_of_the_page_works(folder):
    env = envs.make("my_family:PointLine", episode_length=3, observe_task=True)
    state = env.reset(jax.random.key(0), env.sample_task(jax.random.key(1)))
    place = float(state.task["place"])
    for _ in range(3):
        state = env.step(state, jnp.ones(1))
    x = float(state.physics[0])
    assert 0.2 <= x <= 0.4
    np.testing.assert_allclose(state.observation, [x, place], rtol=1e-6)
    np.testing.assert_allclose(state.reward, -abs(x - place), rtol=1e-6)
    assert bool(state.truncated)
    assert env.title(state.task) == f"place {place:+.2f}"
    lowest, highest = env.limit("place")
    assert lowest == -highest == np.finfo(np.float32).min
    assert 20 <= len(EXAMPLE.strip().splitlines()) <= 40


def test_a_family_may_lie_in_a_package_of_the_current_folder(folder):
    (folder / "mine").mkdir()
    (folder / "my_family.py").rename(folder / "mine/file.py")
    assert envs.load("mine.file:PointLine").__module__ == "mine.file"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "ant_dri",
            r"no task family 'ant_dri'; did you mean ant_dir\? valid: ant, ant_dir, .*:MyFamily",
        ),
        (
            "antimony",
            r"no task family 'antimony'; .*valid: ant, ant_dir, .*my_package.my_file:MyFamily",
        ),
        ("", r"no task family ''; valid: ant, ant_dir"),
        ("nowhere:PointLine", r"No module named 'nowhere'; valid: my_package.my_file:MyFamily"),
        ("my_family.py:PointLine", r"'my_family.py'.*without .py"),
        (":PointLine", r"cannot be imported.*valid: my_package"),
        ("my_family:PointLin", r"'PointLin' is not there; valid in my_family: PointLine$"),
        ("my_family:", r"'' is not there; valid in my_family: PointLine$"),
        ("my_family:jax", r"'jax' is not an envs.base.Environment; valid in my_family: PointLine$"),
        ("my_family:Nothing", r"lacks action_size, advance, .*, worst_reward; valid"),
        ("my_family:NoWorst", r"'my_family:NoWorst' lacks worst_reward; valid"),
        ("my_family:NoBody", r"lacks draw_task, engines, model, observe, reward, worst_reward; "),
        ("broken:PointLine", r"SyntaxError: .*broken.py.*; valid"),
        ("raises:PointLine", r"RuntimeError: the disk is on fire; valid"),
    ],
)
def test_what_is_no_family_is_refused_in_one_line(name, says, folder):
    with (folder / "my_family.py").open("a") as file:
        file.write("""
from envs.physics import Body
class Nothing(Environment): pass
class NoWorst(PointLine): worst_reward = Environment.worst_reward
class NoBody(Body): pass
""")
    (folder / "broken.py").write_text("class PointLine(")
    (folder / "raises.py").write_text("raise RuntimeError('the disk\\nis on fire')")
    with pytest.raises(ValueError, match=says) as refused:
        envs.load(name)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=says):
        envs.make(name)


def test_an_environment_without_a_worst_reward_cannot_be_made():
    class Lacking(PointGoal):
        worst_reward = Environment.worst_reward

    with pytest.raises(TypeError, match="worst_reward"):
        Lacking()


def test_names_of_families_need_neither_jax_nor_an_engine(tmp_path):
    code = """
import sys, envs
assert len(envs.FAMILIES) >= 8
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"jax", "flax", "brax", "mujoco", "gymnasium"}, loaded
assert {name: envs.load(name).backends for name in envs.FAMILIES}["ant_dir"][0] == "spring"
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"brax", "mujoco", "gymnasium", "jmql", "experiments"}, loaded
from jax._src import xla_bridge  # once it has begun, cores cannot become devices, nor hosts join
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
