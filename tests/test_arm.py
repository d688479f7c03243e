"""The arm: MJX against native MuJoCo, the parameters of an object, and what knowing it is worth."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs.arm import KINDS
from experiments.anchors import arm as scripts

ROOT = pathlib.Path(__file__).parent.parent
MIDDLE = {name: (low + high) / 2 for name, (low, high) in envs.load("arm_pick").ranges.items()}


def objects(env, **changes):
    """Returns one object of each kind, [5, ...], in the middle of all ranges unless said."""

    def one(kind):
        return env.make_task(**jax.tree.map(jnp.asarray, MIDDLE | changes | {"kind": kind}))

    return jax.vmap(one)(jnp.arange(len(KINDS)) + 0.5)


def trace(env, tasks, plans):
    """Plays scripts on tasks [N] from one start.

    Returns:
        The first q and qd, and what is seen, [N, T, ...].
    """

    def play(task, plan):
        def step(carry, _):
            state, at = carry
            marker = env.on_object(state.physics, jnp.stack([task["marker"], 0.0]))
            action, at = scripts.act(plan, at, env.hand(state.physics), marker[0])
            state = env.step(state, action)
            seen = {
                "action": jnp.clip(action, -1, 1),
                "q": state.physics.q,
                "qd": state.physics.qd,
                "reward": state.reward,
                "touch": env.touches(state.physics),
                "observation": state.observation,
            }
            return (state, at), seen | state.extras

        first = env.reset(jax.random.key(0), task)
        at = scripts.Progress(jnp.int32(0), jnp.int32(0))
        return (first.physics.q, first.physics.qd), jax.lax.scan(step, (first, at), length=80)[1]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(play))(tasks, plans))


def native_observation(native):
    """What the family says that it observes, of native MuJoCo's bodies."""
    q, v, hand = native.data.qpos, native.data.qvel, native.hand()
    marker = native.on_object(np.array([native.task["marker"], 0.0]))
    tilt = native.data.body("hand").xmat.reshape(3, 3)[0, 2]  # of its upright axis along x
    turn = native.data.body("object").xmat.reshape(3, 3)[[2, 0], 0]
    shown = [hand, q[3:4], [-tilt], v[:4], marker - hand, marker[1:], turn, v[5:]]
    return np.concatenate(shown)


def held(env):
    return objects(env, marker=0.01)


def natives():
    """Returns the five in native MuJoCo."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        tasks = jax.tree.map(np.asarray, held(envs.make("arm_pick")))
    return [scripts.Native(jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(len(KINDS))]


@functools.cache
def grasp(press):
    """Plays the right script on an object of each kind in float64, in both simulators.

    Args:
        press: share of the largest force, or None for the right one.
    """
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        env = envs.make("arm_pick")
        tasks = held(env)
        plans = scripts.right(tasks)
        if press is not None:
            plans = plans._replace(press=jnp.full(len(KINDS), press))
        (q, qd), ours = trace(env, tasks, plans)
    theirs = []
    for i, native in enumerate(natives()):
        native.model.opt.tolerance = 0.0  # all the iterations that it may take
        native.reset(q[i], qd[i])
        seen = []
        for action in ours["action"][i]:
            told = native.step(action)
            state = {"q": native.data.qpos.copy(), "qd": native.data.qvel.copy()}
            seen.append(told | state | {"observation": native_observation(native)})
        theirs.append(jax.tree.map(lambda *x: np.stack(x), *seen))
    return ours, jax.tree.map(lambda *x: np.stack(x), *theirs)


@pytest.mark.slow
def test_a_grasp_of_every_kind_is_that_of_native_mujoco():
    """Exactly until the fingers meet the object; upright capsules then have one contact in MJX
    where native MuJoCo may find two.
    """
    ours, theirs = grasp(None)
    for i in range(len(KINDS)):
        still = np.abs(theirs["qd"][i][:, [5, 7]]).max(-1) < 1e-6
        first = int(np.argmin(still))  # the object moves along, or turns
        assert 5 < first < 40
        for name in ("q", "qd", "reward", "observation"):
            assert np.abs(ours[name][i, :first] - theirs[name][i, :first]).max() < 1e-12
    for i, native in enumerate(natives()):  # what is seen of a held object, wherever it is
        for t in (40, 60, 79):
            native.reset(ours["q"][i, t], ours["qd"][i, t])
            np.testing.assert_allclose(
                ours["observation"][i, t], native_observation(native), atol=1e-9
            )
    assert np.abs(ours["q"] - theirs["q"]).max() < 0.02
    assert (ours["touch"] != theirs["touch"]).any(-1).sum(1).max() <= 2  # of 80 steps
    assert (ours["touch"].all(-1).sum(1) > 30).all()
    assert np.abs(ours["reward"] - theirs["reward"]).max() < 0.03
    np.testing.assert_allclose(ours["reward"].sum(1), theirs["reward"].sum(1), rtol=0.01)
    assert ours["success"][:, -1].all()
    assert theirs["success"][:, -1].all()
    assert not ours["crushed"].any()
    assert not theirs["crushed"].any()


@pytest.mark.slow
def test_what_crushes_an_object_crushes_it_in_native_mujoco_too():
    ours, theirs = grasp(1.0)
    held = slice(-20, None)
    assert ours["crushed"][:, held].all()  # touch does not flicker
    assert theirs["crushed"][:, held].all()
    assert not ours["success"].any()
    np.testing.assert_allclose(ours["reward"].sum(1), theirs["reward"].sum(1), atol=0.7)


@pytest.mark.slow
def test_every_parameter_of_an_object_matters():
    """Each changes what happens, or what is earned, when all else is the same."""
    with jax.numpy_rank_promotion("allow"):
        env = envs.make("arm_pick")
        every = objects(env)
        mug, bottle = (jax.tree.map(lambda x, k=k: x[k : k + 1], every) for k in (1, 4))
        changes = {}
        for name in ("mass", "inertia", "friction", "center", "crush", "grasp"):
            changes[name] = mug, mug | {name: mug[name] * (0.2 if name == "crush" else 1.1)}
        changes["marker"] = mug, mug | {"marker": mug["marker"] + 0.02}
        for part, kind in (("near", mug), ("far", mug), ("handle", mug), ("neck", bottle)):
            row = scripts.PARTS.index(part)
            for name in ("size", "place"):
                changes[f"{name} of the {part}"] = (
                    kind,
                    kind | {name: kind[name].at[0, row].multiply(1.2)},
                )
        first, second = (
            jax.tree.map(lambda *x: jnp.concatenate(x), *tasks)
            for tasks in zip(*changes.values(), strict=True)
        )
        # The same script for both; it goes down on a handle.
        plans = scripts.right(first)
        aside = jnp.array([0.09 if "handle" in name else 0.0 for name in changes])
        plans = plans._replace(x=plans.x + aside)
        tasks = jax.tree.map(lambda *x: jnp.concatenate(x), first, second)
        _, seen = trace(env, tasks, scripts.repeated(plans, 2))
    for i, name in enumerate(changes):
        moved, paid = (
            np.abs(seen[what][i] - seen[what][i + len(changes)]).max() for what in ("q", "reward")
        )
        assert paid > 1e-5, name
        # Only the reward knows two of them, and the marker is where the script is led.
        assert (moved > 1e-5) == (name not in ("crush", "grasp")), name


@pytest.mark.slow
def test_knowing_an_object_is_worth_a_third_more_than_the_best_fixed_plan():
    """In the committed table of both engines, of which MJX is played again on other objects."""
    table = json.loads((ROOT / "experiments/results/arm/scripts.json").read_text())
    for engine in ("mjx", "native"):
        rows = table[engine]
        knows, fixed = (
            np.mean(rows[name]["return"]) for name in ("knows all", "best of all fixed plans")
        )
        assert knows > 4 / 3 * fixed
    with jax.numpy_rank_promotion("allow"):
        env = envs.make("arm_pick")
        tasks = env.sample_tasks(jax.random.key(0), 128)
        plan = scripts.Plan(*map(jnp.float32, table["mjx"]["plan"]))
        plans = scripts.right(tasks), scripts.everywhere(plan, 128)
        plans = jax.tree.map(lambda *x: jnp.concatenate(x), *plans)
        played = scripts.on_mjx(env)(scripts.repeated(tasks, 2), plans, jax.random.key(1))
    returns = played["return"].reshape(2, -1).mean(1)
    assert returns[0] == pytest.approx(np.mean(table["mjx"]["knows all"]["return"]), abs=4)
    assert returns[0] > 4 / 3 * returns[1]
    assert played["success"][:128].mean() > 0.9


@pytest.mark.slow
def test_random_play_of_random_objects_stays_finite():
    table = json.loads((ROOT / "experiments/results/arm/scripts.json").read_text())
    assert table["random"] == {"steps": 256 * 10_000, "blew_up": 0}
    with jax.numpy_rank_promotion("allow"):
        assert scripts.blow_ups(envs.make("arm_pick"), objects=128, episodes=1) == 0


def test_the_hand_is_where_the_joints_put_it():
    env = envs.make("arm_pick")
    for place in ([0.0, 0.3], [-0.2, 0.05], [0.2, 0.4], [0.15, 0.023]):
        q = jnp.concatenate([env.joints(jnp.array(place)), jnp.zeros(5)])
        state = type("State", (), {"q": q})
        np.testing.assert_allclose(env.hand(state), place, atol=1e-5)
        assert abs(float(q[:3].sum())) < 1e-5  # upright


def test_the_marker_hides_the_middle_of_an_object():
    """What is observed of an object is the marker's place, and nothing else of the task."""
    with jax.numpy_rank_promotion("allow"):
        env = envs.make("arm_pick")
        tasks = [objects(env, marker=0.0), objects(env, marker=0.02)]
        tasks = jax.tree.map(lambda *x: jnp.concatenate(x), *tasks)
        reset = jax.jit(jax.vmap(env.reset, in_axes=(None, 0)))
        first, moved = reset(jax.random.key(0), tasks).observation.reshape(2, len(KINDS), -1)
    np.testing.assert_array_equal(first, first[:1].repeat(len(KINDS), 0))
    change = moved[0] - first[0]
    assert change[8] == pytest.approx(0.02, abs=1e-6)
    assert np.count_nonzero(np.abs(change) > 1e-6) == 1


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_split_holds_one_kind_out(kind):
    env = envs.make("arm_pick")
    train, held_out = env.splits[f"no_{KINDS[kind]}"]
    drawn = np.asarray(env.sample_tasks(jax.random.key(0), 64, train)["kind"])
    assert set(drawn) == set(range(len(KINDS))) - {kind}
    assert set(np.asarray(env.sample_tasks(jax.random.key(1), 8, held_out)["kind"])) == {kind}
    assert env.splits["ood"] == env.splits["no_bottle"]


def test_what_an_object_is_made_of_is_drawn_from_its_ranges():
    """Of rods, whose width and height show in each capsule."""
    env = envs.make("arm_pick")
    some = {name: (low + 0.2 * (high - low), high) for name, (low, high) in env.ranges.items()}
    some["kind"] = (3.0, 4.0)
    tasks = env.sample_tasks(jax.random.key(0), 300, some)
    tasks = {name: np.asarray(leaf) for name, leaf in tasks.items()}
    holds = tasks["mass"] * 9.81 / (2 * tasks["friction"])
    drawn = {
        "kind": tasks["kind"] + 0.5,
        "width": tasks["place"][:, 1, 0] / 0.012,
        "height": tasks["size"][:, 0, 1] / 0.012,
        "marker": tasks["marker"],
        "log_mass": np.log(tasks["mass"]),
        "friction": tasks["friction"],
        "strength": (tasks["crush"] - 1.5) / holds,
    }
    assert drawn.keys() == env.ranges.keys()
    for name, values in drawn.items():
        low, high = some[name]
        slack = 0.03 * (high - low) if name != "kind" else 0.5
        assert low - 1e-3 <= values.min() <= low + slack
        assert high - slack <= values.max() <= high + 1e-3
