"""A trained policy outside the trainer: it acts as the run does, adapts as the run does, and says
what is wrong with data from elsewhere.
"""

import dataclasses
import json
import re
import time
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmql
from experiments.export import newest
from jmql import adapt, networks, policy, rollout
from jmql.settings import ConfigError
from tests import tiny

ROOT = Path(__file__).parent.parent


def made(built, state):
    """What `jmql export` writes of a run."""
    config = jmql.Config(**{x.name: getattr(built.config, x.name) for x in jmql.Config().items()})
    about = {
        "observation_size": 2,
        "action_size": 2,
        "task_size": 2,
        "episode_length": 20,
        "slots_per_row": state.memory.data.reward.shape[1],
    }
    return jmql.TrainedPolicy(config, state.agent, state.agent, state.memory, (), about)


@pytest.fixture(scope="module")
def built():
    seen = {"changes": True, "task_head": True}
    return tiny.build(tiny.changed(adapt={"new_share": 0.5, "learning_rate": 1e-2}, network=seen))


@pytest.fixture(scope="module")
def state(built):
    return tiny.filled(built)


@pytest.fixture(scope="module")
def trained(built, state):
    return made(built, state)


def played(built, state, seed=0, history=5):
    """An episode of the run's own greedy policy, as NumPy arrays [20, ...]."""
    task = jax.tree.map(lambda x: x[0], built.held_out)
    acting = built.learner.greedy(built.learner.actor(state.agent), jnp.int32(history))

    @jax.jit
    def play(key):
        start = rollout.begin(acting, built.env.reset(key, task))
        return rollout.episode(built.env, acting, start, key).steps

    return jax.device_get(play(jax.random.key(seed)))


def episode(steps):
    observation = np.concatenate([steps.observation, steps.next_observation[-1:]])
    return jmql.Episode(observation, steps.action, steps.reward)


@pytest.mark.parametrize(("history", "changes"), [(0, False), (0, True), (20, True)])
def test_it_acts_as_the_run_does(built, state, history, changes):
    """Contexts are carried along and never read again, in short windows and in long ones."""
    evaluated = {"history_length": history}
    if changes:
        config = dataclasses.replace(built.config.evaluate, **evaluated)
        other = tiny.build(dataclasses.replace(built.config, evaluate=config))
    else:
        other = tiny.build(tiny.changed(evaluate=evaluated))
        state = tiny.filled(other)
    trained, steps = made(other, state), played(other, state, history=history or 5)
    carry, reward = trained.start(), np.nan  # in the first step nobody looks at it
    for i in range(20):
        action, carry = trained.act(steps.observation[i], carry, reward)
        np.testing.assert_allclose(action, steps.action[i], atol=1e-6)
        reward = steps.reward[i]


def test_noise_is_remembered_as_part_of_the_action(trained):
    start = trained.start()
    still, _ = trained.act(np.ones(2), start)
    moved, carry = trained.act(np.ones(2), start, noise=np.array([0.1, 5.0]))
    np.testing.assert_allclose(moved, [still[0] + 0.1, 1.0], rtol=1e-5)
    np.testing.assert_array_equal(carry.action, moved)


def test_a_step_takes_less_than_a_millisecond(trained):
    carry = trained.start()
    _, carry = trained.act(np.zeros(2), carry)
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        _, carry = trained.act(np.zeros(2), carry, 1.0)
        times.append(time.perf_counter() - begun)
    assert min(times) < 1e-3  # the rest is other work on the machine


def test_it_adapts_as_the_run_does(built, state, trained):
    """Two shots; two episodes are padded to two, as they are, and one to one."""
    first, second = (played(built, state, seed) for seed in (0, 1))
    modules, agent = networks.make(built.config.network, 2), built.learner.begin(state.agent)
    adapted = trained
    for shot, steps in enumerate((first, second)):
        seen = [first, second][: shot + 1]
        numbers = dataclasses.replace(built.config.adapt, episodes=len(seen))
        config = dataclasses.replace(built.config, adapt=numbers)
        transitions = jax.tree.map(lambda *x: jnp.stack(x), *seen)
        data = jmql.NewData(transitions, jnp.ones((len(seen), 20), bool))

        @jax.jit
        def known(agent, shot, config=config, data=data):
            key = jax.random.fold_in(jax.random.key(7), shot)
            memory = state.memory
            return adapt.adapt(config, modules, state.agent, agent, data, memory, key, shot)

        expected, metrics = known(agent, jnp.int32(shot))
        agent = expected.agent
        adapted, diagnostics = adapted.adapt([episode(steps)], seed=7)
        assert len(adapted.episodes) == shot + 1
        chex.assert_trees_all_close(adapted.agent, agent, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(diagnostics, dict(metrics), rtol=1e-3, atol=1e-4)
    assert agent.updates - state.agent.updates == 2 + 4 + 4  # step 1 belongs to the first shot
    start = adapted.start()
    assert (adapted.act(np.zeros(2), start)[0] != trained.act(np.zeros(2), start)[0]).any()


def test_a_file_holds_it_all(trained, tmp_path, built, state):
    path = tmp_path / "point.jmql"
    trained.save(path)
    loaded = jmql.load(path)
    assert loaded.config == trained.config
    assert loaded.about == trained.about
    chex.assert_trees_all_equal(loaded.agent, trained.agent)
    chex.assert_trees_all_equal(loaded.memory, trained.memory)
    data = [episode(played(built, state))]
    chex.assert_trees_all_equal(loaded.adapt(data)[0].agent, trained.adapt(data)[0].agent)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.jmql"
    with pytest.raises(FileNotFoundError):
        jmql.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"x.jmql is not a policy that JMQL has written"):
        jmql.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("about.json", json.dumps({"config": {}, "about": {}}))
    with pytest.raises(ConfigError, match=r"x.jmql is not a policy"):
        jmql.load(path)


def test_bad_episodes_are_refused_by_name(built, state, trained):
    good = episode(played(built, state))
    nan = good.reward.copy()
    nan[3] = np.nan
    for bad, said in {
        "empty": (good._replace(reward=[]), "episode 1 is empty"),
        "short": (
            good._replace(observation=good.observation[:-1]),
            r"observation of episode 1 has the shape \(20, 2\); with 20 rewards it must be",
        ),
        "wide": (good._replace(action=np.zeros((20, 3))), r"action of episode 1 has the shape"),
        "nan": (good._replace(reward=nan), "reward of episode 1 is not finite"),
        "far": (good._replace(action=2 * np.ones((20, 2))), "action of episode 1 reaches 2;"),
    }.values():
        with pytest.raises(ValueError, match=said):
            trained.adapt([good, bad])
    with pytest.raises(ValueError, match="at least one is needed"):
        trained.adapt([])
    with pytest.raises(
        ValueError, match=r"the observation has the shape \(3,\); it must be \(2,\)"
    ):
        trained.act(np.zeros(3), trained.start())
    none = dataclasses.replace(trained, memory=newest(state.memory, 0))
    with pytest.raises(ConfigError, match="exported without replay"):
        none.adapt([good])


def test_an_end_of_the_task_is_not_an_end_of_time(built, state):
    """What is beyond the end of an episode is not valid, and only what terminated has no value."""
    long = episode(played(built, state))
    short = jmql.Episode(long.observation[:6], long.action[:5], long.reward[:5], terminated=True)
    data = policy.padded([long, short], 4, 20)
    np.testing.assert_array_equal(data.valid.sum(1), [20, 5, 0, 0])
    assert np.argwhere(data.transitions.terminated).tolist() == [[1, 4]]
    assert np.argwhere(data.transitions.truncated).tolist() == [[0, 19]]
    np.testing.assert_array_equal(data.transitions.step, [np.arange(20)] * 4)
    np.testing.assert_array_equal(data.transitions.next_observation[1, :5], long.observation[1:6])


def test_a_part_of_the_replay_is_its_newest_steps(state):
    """As many of each row, in their order, and full: the oldest serve as history only."""
    part = newest(state.memory, 8)
    assert part.data.reward.shape == (4, 8)
    assert (int(part.size), int(part.cursor)) == (8, 0)
    last = np.asarray(state.memory.data.step)[:, : int(state.memory.size)][:, -8:]
    np.testing.assert_array_equal(part.data.step, last)


@pytest.mark.parametrize(
    ("which", "name", "sizes"), [(0, "cheetah", (20, 6)), (1, "walker", (17, 6))]
)
def test_the_examples_of_the_documents_run(which, name, sizes, tmp_path, monkeypatch, capsys):
    """With an agent that has learned nothing, of the sizes of the body."""
    config = jmql.Config(
        network=jmql.NetworkConfig((16,), 4, 5),
        td3=jmql.TD3Config(batch_size=16),
        adapt=jmql.AdaptConfig(step1_updates=1, updates=1, batch_multiple=1),
        collect=jmql.CollectConfig(rows=2),
    )
    about = {
        "observation_size": sizes[0],
        "action_size": sizes[1],
        "episode_length": 200,
        "slots_per_row": 50,
    }
    agent, memory = policy.blank(config, about)
    memory = memory.replace(size=jnp.int32(50))
    jmql.TrainedPolicy(config, agent, agent, memory, (), about).save(tmp_path / f"{name}.jmql")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/outside.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[which]
    exec(compile(code, "docs/outside.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"after {i} shots" for i in range(6)]
