"""Runs side by side in one process are what each of them is alone."""

import dataclasses
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, cli, memory, population, run, tracking, train
from experiments.config import RunConfig, RunFailed, TrackingConfig
from experiments.stop import Stop
from jmql import settings
from jmql.settings import ConfigError
from tests import tiny

TRUE, FALSE = jnp.array(True), jnp.array(False)
# Each number that Meta-Q-Learning reads has another value.
OTHER = settings.replaced(
    tiny.CONFIG,
    {
        "td3.learning_rate": 3e-3,
        "td3.discount": 0.9,
        "td3.tau": 0.1,
        "td3.target_noise": 0.1,
        "td3.target_noise_clip": 0.2,
        "collect.exploration_noise": 0.1,
        "propensity.inverse_regularization": 0.1,
        "propensity.log_odds_clip": 0.5,
        "propensity.zero_below": 0.5,
        "adapt.exploration_noise": 0.1,
        "adapt.learning_rate": 1e-2,
        "adapt.tau": 0.2,
        "adapt.prox_coef": 1.0,
        "seed": 7,
    },
)


def ends(built, numbers):
    """What a population, or a run alone, is after warm-up and two rounds of learning."""
    cycle = jax.jit(built.cycle)
    state, _, _ = cycle(built.init(built.keys), jnp.int32(2), TRUE, TRUE, numbers)
    end = cycle(state, jnp.int32(2), FALSE, TRUE, numbers)
    return jax.device_get(checkpoint._plain(end))


def test_every_number_of_a_member_is_that_of_a_run_alone():
    ours, theirs = settings.numbers(tiny.CONFIG), settings.numbers(OTHER)
    # None is left out but those of P3O, which tests/test_p3o.py holds: these learners read none.
    same = {name for name in ours if ours[name] == theirs[name]}
    assert same == {name for name in ours if name.startswith("p3o.")}
    together = population.build([tiny.CONFIG, OTHER])
    together = dataclasses.replace(together, env=tiny.build().env)
    both = ends(together, together.numbers)
    for i, config in enumerate((tiny.CONFIG, OTHER)):
        alone = ends(tiny.build(config), {})  # there the numbers are constants
        member = jax.tree.map(lambda x, i=i: x[i : i + 1], both)
        chex.assert_trees_all_close(member[0], alone[0], rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(member[1:], alone[1:], rtol=2e-3, atol=1e-4)


def test_what_the_compiled_program_depends_on_is_refused():
    for changed in (
        {"td3": {"batch_size": 8}},
        {"adapt": {"new_share": 0.5}},
        {"tasks": {"seed": 1}},
        {"train": {"env_steps": 320}},
    ):
        ((part, values),) = changed.items()
        with pytest.raises(ConfigError, match=f"{part}.{min(values)} differs between runs of one"):
            population.build([tiny.CONFIG, tiny.changed(**changed)])
    named = settings.replaced(tiny.CONFIG, {"run_id": "a"})
    with pytest.raises(ConfigError, match="run_id a is given twice"):
        population.build([named, settings.replaced(named, {"seed": 1})])
    with pytest.raises(ConfigError, match=r"td3.tau is 7"):
        population.build([tiny.CONFIG, settings.replaced(tiny.CONFIG, {"td3.tau": 7.0})])


def test_members_need_names(runs):
    with pytest.raises(ConfigError, match="a --member has no --run-id"):
        train.train([runs[0], settings.replaced(runs[1], {"run_id": ""})], Stop())


def test_the_words_of_members_stand_after_the_others():
    words = ["--task", "point_goal", "--td3.tau", "0.1", "--member", "--seed 1 --run-id 'a'"]
    one, two = cli._members([*words, "--member=--td3.tau 0.2"])
    assert (one.seed, one.run_id, one.td3.tau) == (1, "a", 0.1)
    assert (two.seed, two.run_id, two.td3.tau) == (0, "", 0.2)
    (lone,) = cli._members(words[:4])
    assert lone.td3.tau == 0.1
    with pytest.raises(ConfigError, match=r"--member is .*No closing quotation"):
        cli._members([*words[:4], "--member", "'"])


@pytest.mark.parametrize(
    ("steps", "groups"),
    {
        "together": ([[80, 160], [80, 160]], [(160, [0, 1])]),
        "new": ([[], []], [(0, [0, 1])]),
        "killed between two saves": ([[80, 160], [80, 160, 240]], [(160, [0, 1])]),
        "killed between their copies": ([[80], [80, 160, 240]], [(80, [0, 1])]),
        "killed in the first save": ([[], [80]], [(0, [0, 1])]),
        "two are new": ([[], [80, 160], []], [(0, [0, 2]), (160, [1])]),
        "nothing in common": ([[200], [240, 280], [280]], [(200, [0]), (280, [1, 2])]),
    }.values(),
)
def test_who_goes_on_together_and_from_where(steps, groups):
    assert population.together(steps, nothing=80) == groups


@pytest.fixture
def runs(tmp_path) -> list[RunConfig]:
    base = dataclasses.replace(
        tiny.CONFIG, runs=str(tmp_path), tracking=TrackingConfig(wandb="disabled")
    )
    numbers = ({}, {"td3.tau": 0.1}, {"seed": 5})
    return [
        settings.replaced(base, {"run_id": name} | values)
        for name, values in zip("abc", numbers, strict=True)
    ]


def rows(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in tracking.read(folder)
    ]


def test_a_population_makes_run_directories_that_are_like_any_other(runs, tmp_path, capsys):
    assert train.train(runs, Stop()) == 0
    assert "3 runs, which differ in td3.tau, seed" in capsys.readouterr().out
    folders = [tmp_path / "point_goal" / name for name in "abc"]
    before = [rows(folder) for folder in folders]
    assert [{row["seed"] for row in some} for some in before] == [{3}, {3}, {5}]
    for folder, config in zip(folders, runs, strict=True):
        assert run.read_config(folder) == config
        state = run.trained(folder, run.load(folder, config))
        assert state.rounds.shape == (1,)
        assert state.rounds[0] == 6
    tasks = [np.load(folder / "tasks.npz")["held_out/goal"] for folder in folders]
    np.testing.assert_array_equal(tasks[0], tasks[2])
    # One of them goes on alone, from where all were.
    config = settings.replaced(runs[1], {"train.env_steps": 320})
    assert train.train([config], Stop()) == 0
    assert rows(folders[1])[:-1] == before[1]

    # A kill between two saves: all go on from the one before, to the same end.
    longer = [settings.replaced(config, {"train.env_steps": 320}) for config in runs[::2]]
    shutil.rmtree(folders[0] / "checkpoints" / "240")
    assert train.train(longer, Stop()) == 0
    assert [rows(folder)[:-1] for folder in folders[::2]] == before[::2]
    assert {len(rows(folder)) for folder in folders} == {4}

    # What is done is left, what is elsewhere goes on from there, and none waits for another.
    new = settings.replaced(longer[0], {"run_id": "d", "seed": 9})
    capsys.readouterr()
    assert train.train([*longer, new], Stop()) == 0
    assert "seeds 9..9" in capsys.readouterr().out  # trained alone
    assert [rows(folder)[:-1] for folder in folders[::2]] == before[::2]
    assert len(rows(folders[0].with_name("d"))) == 4


def test_one_that_diverges_does_not_end_the_others(runs, tmp_path, monkeypatch, capsys):
    calls = []

    def cycle(state, rounds, warmup, evaluating, numbers):
        calls.append(numbers["td3.tau"].tolist())
        loss = np.zeros(len(state.rounds))
        if len(loss) == 3 and len(calls) == 2:
            loss[1] = np.nan
        done = int(state.rounds[0]) + 2
        state = state.replace(rounds=state.rounds + 2)
        return state, *tiny.measured(done, len(loss), **{"train/critic_loss": loss})

    monkeypatch.setattr(train, "compiled", lambda program: (cycle, 0.0))
    monkeypatch.setattr(memory, "of_program", lambda compiled: 0)
    with pytest.raises(RunFailed, match="failed: b"):
        train.train(runs, Stop())
    assert len(calls) == 3
    np.testing.assert_allclose(calls[0], [0.005, 0.1, 0.005])
    said = capsys.readouterr().out
    assert "b failed: train/critic_loss of seed 3 is not finite" in said
    assert "the last good checkpoint is of 80 steps" in said
    lengths = [len(rows(tmp_path / "point_goal" / name)) for name in "abc"]
    assert lengths == [3, 1, 3]
    # It is remembered, and holds the others up no more: it alone is tried again.
    marks = [(tmp_path / "point_goal" / name / "failed.txt").exists() for name in "abc"]
    assert marks == [False, True, False]
    calls.clear()
    assert train.train(runs, Stop()) == 0
    np.testing.assert_allclose(calls, [[0.1], [0.1]])
    assert not (tmp_path / "point_goal" / "b" / "failed.txt").exists()
    lengths = [len(rows(tmp_path / "point_goal" / name)) for name in "abc"]
    assert lengths == [3, 3, 3]
