"""Forces of our own rows and solver beside MJX's: parity with native MuJoCo is tested with physics.

A model of all that a step of MJX may meet, in float64.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx

from envs import rows, steps

# Two trees, of which one lies on the other; contacts with and without friction, and parameters of
# all kinds: of time, too short ones among them, and of stiffness, with another power and middle.
MODEL = """
<mujoco>
  <option impratio="2" solver="Newton" tolerance="0" iterations="100" ls_iterations="50"/>
  <default><geom type="capsule" size=".1 .3" friction=".7"/></default>
  <worldbody>
    <geom type="plane" size="5 5 1" condim="1" solimp=".5 .95 .1 .3 3"/>
    <body name="first" pos="0 0 .1">
      <freejoint/>
      <geom zaxis="1 0 0" condim="3" solref="-500 -20"/>
      <body pos=".6 0 0" gravcomp=".5">
        <joint name="hinge" axis="0 1 0" range="-10 10" solreflimit="-300 -10" margin=".1"/>
        <geom zaxis="1 0 0" condim="1" friction=".2" solimp="0 .8 .03"/>
        <body name="last" pos=".5 0 0">
          <joint name="slide" type="slide" axis="1 0 0" range="-.1 .2" solreflimit=".001 .7"
            damping="1" stiffness="20"/>
          <geom type="sphere" size=".1" condim="1"/>
          <site name="tip"/>
        </body>
      </body>
    </body>
    <body pos=".7 0 .25">
      <freejoint/>
      <geom zaxis="0 1 0" condim="3" margin=".01"/>
    </body>
  </worldbody>
  <contact><exclude body1="first" body2="last"/></contact>
  <tendon>
    <fixed name="rope" armature=".3" stiffness="3">
      <joint joint="hinge" coef="1"/><joint joint="slide" coef="2"/>
    </fixed>
  </tendon>
  <actuator><motor joint="hinge" gear="3"/><position joint="slide" kp="5"/></actuator>
  <sensor><accelerometer site="tip"/><jointpos joint="hinge"/></sensor>
</mujoco>
"""
BALL = '<body pos="0 3 3"><joint type="ball" range="0 20"/><geom/></body></worldbody>'
EQUAL = '<equality><joint joint1="hinge" joint2="slide"/></equality></mujoco>'


def states(model, num):
    """Draws positions, velocities, controls and pushes, leaves [num, ...]."""
    random = np.random.default_rng(0)
    qpos = model.qpos0 + random.uniform(-0.2, 0.2, (num, model.nq))
    return {
        "qpos": qpos,
        "qvel": random.normal(size=(num, model.nv)),
        "ctrl": random.normal(size=(num, model.nu)),
        "qfrc_applied": random.normal(size=(num, model.nv)),
        "xfrc_applied": random.normal(size=(num, model.nbody, 6)),
    }


def test_they_are_those_of_mjx(rank_promotion):
    model = mujoco.MjModel.from_xml_string(MODEL)

    def place(state):
        data = mjx.make_data(system).replace(**state)
        for part in (mjx.kinematics, mjx.com_pos, mjx.tendon, mjx.collision):
            data = part(system, data)
        theirs = mjx.make_constraint(system, data)._impl
        return rows.make(system, data), rows.Rows(theirs.efc_J, theirs.efc_D, theirs.efc_aref)

    with jax.enable_x64(True):
        system = mjx.put_model(model)
        ours, theirs = jax.jit(jax.vmap(place))(jax.tree.map(jnp.asarray, states(model, 300)))
    acting = (np.abs(theirs.jacobian).max(-1) > 0).mean(0)
    assert acting.min() > 0, acting
    assert acting.max() < 1, acting
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("</worldbody>", BALL),
        ("</mujoco>", EQUAL),
        ('armature=".3"', 'armature=".3" range="-.1 .1"'),
        ('condim="3" margin=".01"', 'condim="4"'),
        ("<default>", '<option><flag limit="disable"/></option><default>'),
        ("<default>", '<option><flag refsafe="disable"/></option><default>'),
        ("<default>", '<option><flag constraint="disable"/></option><default>'),
    ],
)
def test_rows_that_are_not_ours_are_seen(old, new):
    def usual(text):
        system = mjx.put_model(mujoco.MjModel.from_xml_string(text))
        return steps.usual(system, mjx.make_data(system)._impl.contact.dim)

    assert usual(MODEL)
    assert not usual(MODEL.replace(old, new))


def other():
    """Returns the model with an equality, the limit of a ball, and a contact that resists turns."""
    text = MODEL.replace("</worldbody>", BALL).replace("</mujoco>", EQUAL)
    return text.replace('condim="3" margin=".01"', 'condim="4"')


@pytest.mark.parametrize("text", [MODEL, other()], ids=["our rows", "rows of mjx"])
def test_forces_are_those_of_mjx(text, rank_promotion):
    model = mujoco.MjModel.from_xml_string(text)

    def both(state):
        given = mjx.make_data(system).replace(**state)
        return steps.forces(system, given), mjx.forward(system, given)

    with jax.enable_x64(True):
        system = mjx.put_model(model)
        ours, theirs = jax.jit(jax.vmap(both))(jax.tree.map(jnp.asarray, states(model, 8)))
    assert np.abs(theirs.qfrc_constraint).max() > 1
    for name, expected in vars(theirs).items():
        if name not in {"qacc_smooth", "_impl"}:
            jax.tree.map(
                lambda x, y, name=name: np.testing.assert_allclose(
                    x, y, rtol=1e-6, atol=1e-6, err_msg=name
                ),
                getattr(ours, name),
                expected,
            )
    np.testing.assert_allclose(ours._impl.efc_force, theirs._impl.efc_force, rtol=1e-6, atol=1e-5)
