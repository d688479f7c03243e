"""Pictures: bodies are where native MuJoCo has them, and are drawn as long and as thick."""

import importlib.util
import pathlib
import types

import jax
import mujoco
import numpy as np
import pytest

import envs
from envs.base import Capsules
from experiments import pictures


def native(package: str, model: str, q: np.ndarray) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """Returns a model of a package and where it is at a position [qpos]."""
    folder = pathlib.Path(importlib.util.find_spec(package).origin).parent
    mujoco.set_mju_user_warning(lambda message: None)
    found = mujoco.MjModel.from_xml_path(str(next(folder.glob(f"envs/**/assets/{model}"))))
    data = mujoco.MjData(found)
    data.qpos = q
    mujoco.mj_kinematics(found, data)
    return found, data


def assert_same(capsules: Capsules, model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """In any order: joining bodies changes it."""
    body = model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    capsule = model.geom_type[body] == mujoco.mjtGeom.mjGEOM_CAPSULE
    half = np.where(capsule, model.geom_size[body, 1], 0.0)
    axis = half[:, None] * data.geom_xmat[body].reshape(-1, 3, 3)[:, :, 2]
    middle = data.geom_xpos[body]
    ends = np.stack([middle - axis, middle + axis], axis=1)
    here = np.lexsort(np.asarray(capsules.ends).mean(axis=1).round(3).T)
    there = np.lexsort(middle.round(3).T)
    np.testing.assert_allclose(capsules.ends[here], ends[there], atol=1e-5)
    np.testing.assert_allclose(capsules.radius[here], model.geom_size[body, 0][there], rtol=1e-6)


def test_capsules_are_the_geoms_of_a_model_on_mjx(rank_promotion):
    """Of the humanoid, which has several on one body."""
    env = envs.make("humanoid_dir", "mjx")
    q = np.asarray(env.system({}).init_q) + np.random.default_rng(0).uniform(-0.3, 0.3, 24)
    model, data = native("gymnasium", "humanoid.xml", q)
    links = types.SimpleNamespace(pos=data.xpos[1:], rot=data.xquat[1:])
    assert_same(env.capsules(types.SimpleNamespace(x=links)), model, data)


def test_capsules_are_the_geoms_of_a_model_on_spring(rank_promotion):
    """Of the ant, of which Brax joins bodies without a joint to their parents."""
    env = envs.make("ant_dir", "spring")
    physics = jax.jit(env.start)(jax.random.key(1), env.sample_task(jax.random.key(0)))
    assert_same(env.capsules(physics), *native("brax", "ant.xml", physics.q))


def test_outline_is_the_points_at_a_radius_from_a_rod():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(5, 2, 2))
    ends[0, 1] = ends[0, 0]  # a sphere
    radius = rng.uniform(0.1, 0.5, 5)
    polygons = pictures.outline(ends, radius)
    way = ends[:, 1] - ends[:, 0]
    from_first = polygons - ends[:, :1]
    length = np.maximum((way**2).sum(-1), 1e-12)[:, None]
    along = np.clip((from_first * way[:, None]).sum(-1) / length, 0.0, 1.0)
    distance = np.linalg.norm(from_first - along[..., None] * way[:, None], axis=-1)
    np.testing.assert_allclose(distance, np.broadcast_to(radius[:, None], distance.shape))


@pytest.mark.parametrize(("elevation", "azimuth"), [(0.0, 0.0), (30.0, 15.0), (12.0, -30.0)])
def test_an_eye_sees_a_right_angle_as_one_and_what_is_up_as_up(elevation, azimuth):
    right, up, away = eye = pictures.camera(elevation, azimuth)
    np.testing.assert_allclose(eye @ eye.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.cross(right, away), up, atol=1e-12)
    assert right[2] == 0.0
    assert up[2] > 0.0
    assert away[2] <= 0.0  # the eye looks down


def test_every_family_of_the_benchmark_is_shown():
    from_engines = {k for k, v in envs.FAMILIES.items() if v.backends is not envs.NO_ENGINE}
    assert pictures.FILMS.keys() == from_engines
