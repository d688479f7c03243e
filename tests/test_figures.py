"""Figures: bodies are where native MuJoCo has them, and are drawn as long and as thick."""

import importlib.util
import itertools
import json
import pathlib
import types

import jax
import matplotlib
import mujoco
import numpy as np
import pytest
from matplotlib.figure import Figure

import envs
from envs.physics import Shapes
from experiments.figures import __main__ as figures
from experiments.figures import beside, drawing, kinds, learning

ROOT = pathlib.Path(__file__).parent.parent


def native(package: str, model: str, q: np.ndarray) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """Returns a model of a package and where it is at a position [qpos]."""
    folder = pathlib.Path(importlib.util.find_spec(package).origin).parent
    mujoco.set_mju_user_warning(lambda message: None)
    found = mujoco.MjModel.from_xml_path(str(next(folder.glob(f"envs/**/assets/{model}"))))
    data = mujoco.MjData(found)
    data.qpos = q
    mujoco.mj_kinematics(found, data)
    return found, data


def assert_same(shapes: Shapes, model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """In any order: joining bodies changes it."""
    body = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    capsule = model.geom_type[body] == mujoco.mjtGeom.mjGEOM_CAPSULE
    half = np.where(capsule, model.geom_size[body, 1], 0.0)
    axis = half[:, None] * data.geom_xmat[body].reshape(-1, 3, 3)[:, :, 2]
    middle = data.geom_xpos[body]
    ends = np.stack([middle - axis, middle + axis], axis=1)
    here = np.lexsort(np.asarray(shapes.ends).mean(axis=1).round(3).T)
    there = np.lexsort(middle.round(3).T)
    np.testing.assert_allclose(shapes.ends[here], ends[there], atol=1e-5)
    np.testing.assert_allclose(shapes.radius[here], model.geom_size[body, 0][there], rtol=1e-6)


def test_capsules_are_the_geoms_of_a_model_on_mjx(rank_promotion):
    """Of the humanoid, which has several on one body."""
    env = envs.make("humanoid_dir", "mjx")
    q = np.asarray(env.system({}).init_q) + np.random.default_rng(0).uniform(-0.3, 0.3, 24)
    model, data = native("gymnasium", "humanoid.xml", q)
    links = types.SimpleNamespace(pos=data.xpos[1:], rot=data.xquat[1:])
    assert_same(env.shapes(types.SimpleNamespace(x=links), {}), model, data)


def test_capsules_are_the_geoms_of_a_model_on_spring(rank_promotion):
    """Of the ant, of which Brax joins bodies without a joint to their parents."""
    env = envs.make("ant_dir", "spring")
    task = env.sample_task(jax.random.key(0))
    physics = jax.jit(env.start)(jax.random.key(1), task)
    assert_same(env.shapes(physics, task), *native("brax", "ant.xml", physics.q))


def test_outline_is_the_points_at_a_radius_from_a_rod():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(5, 2, 2))
    ends[0, 1] = ends[0, 0]  # a sphere
    radius = rng.uniform(0.1, 0.5, 5)
    polygons = drawing.outline(ends, radius)
    way = ends[:, 1] - ends[:, 0]
    from_first = polygons - ends[:, :1]
    length = np.maximum((way**2).sum(-1), 1e-12)[:, None]
    along = np.clip((from_first * way[:, None]).sum(-1) / length, 0.0, 1.0)
    distance = np.linalg.norm(from_first - along[..., None] * way[:, None], axis=-1)
    np.testing.assert_allclose(distance, np.broadcast_to(radius[:, None], distance.shape))


@pytest.mark.parametrize(("elevation", "azimuth"), [(0.0, 0.0), (30.0, 15.0), (12.0, -30.0)])
def test_an_eye_sees_a_right_angle_as_one_and_what_is_up_as_up(elevation, azimuth):
    right, up, away = eye = drawing.camera(elevation, azimuth)
    np.testing.assert_allclose(eye @ eye.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.cross(right, away), up, atol=1e-12)
    assert right[2] == 0.0
    assert up[2] > 0.0
    assert away[2] <= 0.0  # the eye looks down


def test_hull_is_what_a_box_covers():
    """Of a box seen from anywhere, and of a square with points within and on its edges."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=3))) * [0.3, 0.5, 0.7]
    seen = (corners @ turn)[:, :2]
    found = drawing.hull(seen)
    assert len(found) == 6  # three sides of a box are seen
    way = np.roll(found, -1, axis=0) - found
    to_all = seen[None] - found[:, None]
    left = way[:, None, 0] * to_all[..., 1] - way[:, None, 1] * to_all[..., 0]
    assert left.min() > -1e-12  # every corner lies on the left of every edge
    assert {tuple(x) for x in found} <= {tuple(x) for x in seen}
    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2], [1, 1], [1, 0], [2, 1], [0, 0]], float)
    assert {tuple(x) for x in drawing.hull(square)} == {(0, 0), (2, 0), (2, 2), (0, 2)}
    assert len(drawing.hull(square)) == 4


def test_a_body_is_drawn_from_the_farthest_part_to_the_nearest():
    """A ball in front of a box, both at places of their own."""
    matplotlib.use("agg")
    axis = Figure().add_subplot()
    signs = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    shapes = Shapes(
        ends=np.array([[[0.0, -2.0, 1.0]] * 2]),
        radius=np.array([0.25]),
        corners=(signs + np.array([0.0, 2.0, 0.5]))[None],
    )
    place = np.array([3.0, 1.0])
    drawing.draw_body(axis, drawing.camera(0.0, 0.0), shapes, place)
    shadow, body = (c.get_paths() for c in axis.collections)
    assert len(shadow) == len(body) == 2
    box, ball = (path.vertices for path in body)
    np.testing.assert_allclose([box.min(0), box.max(0)], [[2.5, 1.0], [3.5, 2.0]])
    np.testing.assert_allclose([ball.min(0), ball.max(0)], [[2.75, 1.75], [3.25, 2.25]])


def test_wall_time_is_the_sum_of_that_of_the_rows():
    rows = [(1200, 10.0), (4200, 50.0), (7200, 25.0)]
    names = ("env_steps", "time/env_steps_per_second")
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    np.testing.assert_allclose(learning._minutes(rows, 1), [2.0, 3.0, 5.0])
    np.testing.assert_allclose(learning._minutes(rows, 3), [6.0, 9.0, 15.0])


def test_learning_is_drawn_from_committed_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    figures.main(["learning"])
    assert (tmp_path / "docs/learning.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(
        SystemExit,
        match=r"usage: .*learning adaptation kinds p3o.*paths \| goals \| grasp RUN PICTURE",
    ):
        figures.main(["pictures"])


def test_reuse_by_kind_is_what_its_tasks_weigh_over_what_even_reuse_gives():
    """Of two balls and two mugs, the weights of replay are 0.5, 0.3, 0.2 and 0 in the mean."""
    row = {
        "train_tasks": {"kind": [0.0, 0.0, 1.0, 1.0]},
        "tasks/reuse": [[0.6, 0.2, 0.2, 0.0], [0.4, 0.4, 0.2, 0.0]],
    }
    times = kinds.reuse([row, row])
    np.testing.assert_allclose(times[:2], [1.6, 0.4])
    assert np.isnan(times[2:]).all()
    other = row | {"train_tasks": {"kind": [0.0, 0.0, 0.0, 2.0]}}  # a seed that has drawn no mug
    np.testing.assert_allclose(kinds.reuse([row, other])[:3], [(1.6 + 4 / 3) / 2, 0.4, 0.0])


def test_algorithms_are_beside_each_other_at_equal_steps_and_minutes():
    """A seed has its part of the time of those it was trained with."""
    line = {
        "changed": {"seeds": 2},
        "env_steps": [0, 10, 20],
        "minutes": [1, 2, 8],
        "eval/return_pre": [-3.0, -2.0, -1.0],
        "eval/return_post": [None, -1.5, -0.5],
    }
    other = line | {"eval/return_pre": [-6.0, -5.0, -4.0]}
    np.testing.assert_allclose(beside.at([line, other], "pre", 0, 15), [-1.5, -4.5])
    np.testing.assert_allclose(beside.at([line, other], "pre", 1, 1.6), [-1.8, -4.8])
    np.testing.assert_allclose(beside.at([line], "post", 1, np.inf), [-0.5])
    np.testing.assert_allclose(beside.at([line], "post", 0, 5), [np.nan])


def test_what_a_run_knows_of_its_task_is_what_it_changed(tmp_path, monkeypatch):
    none = {"network.context_size": 0}
    changed = [{}, none, none | {"observe_task": True}, {"context_span": "trial"}]
    lines = [
        {"task": "point_goal", "algorithm": algorithm, "changed": it}
        for algorithm in ("p3o", "mql")
        for it in changed[: 4 if algorithm == "p3o" else 3]
    ]
    (tmp_path / "p3o").mkdir()
    (tmp_path / "p3o" / "families.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(beside, "RESULTS", tmp_path)
    found = {
        key: [line["changed"] for line in some] for key, some in beside.runs("point_goal").items()
    }
    assert found == {
        ("MQL", "context"): [{}],
        ("P3O", "context"): [{}],
        ("P3O", "context over a trial"): [{"context_span": "trial"}],
        ("MQL", "no context"): [none],
        ("P3O", "no context"): [none],
        ("MQL", "told the task"): [changed[2]],
        ("P3O", "told the task"): [changed[2]],
    }
    assert next(iter(found)) == ("MQL", "context")
