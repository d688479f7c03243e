"""What cannot work is refused, by the name of the field."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from experiments.config import RunConfig, from_json, identity
from jmql.config import Config
from jmql.settings import ConfigError, Kind, Settings, flatten, replaced


def change(config, name, value):
    """Returns the configuration with one setting, such as `td3.tau`, changed."""
    part, _, field = name.rpartition(".")
    if not part:
        return dataclasses.replace(config, **{field: value})
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **{field: value})}
    )


def bounds(config, prefix=""):
    """Returns the bounds that stand beside the fields, by dotted name."""
    found = {}
    for item in dataclasses.fields(config):
        if isinstance(getattr(config, item.name), Settings):
            found |= bounds(getattr(config, item.name), f"{prefix}{item.name}.")
        elif "bounds" in item.metadata:
            found[prefix + item.name] = item.metadata["bounds"]
    return found


def numeric(config, prefix=""):
    """Returns the dotted names of fields whose type admits a number."""
    found = set()
    for item in dataclasses.fields(config):
        if isinstance(getattr(config, item.name), Settings):
            found |= numeric(getattr(config, item.name), f"{prefix}{item.name}.")
        elif {int, float} & {item.type, *typing.get_args(item.type)}:
            found.add(prefix + item.name)
    return found


def bad_values():
    """One value beyond every end of every bound, and NaN."""
    for name, (lowest, highest, above) in bounds(RunConfig()).items():
        yield name, lowest if above else lowest - 1
        yield name, math.nan
        yield name, highest + 1


def test_defaults_are_valid():
    Config().validate()


@pytest.mark.parametrize(("name", "value"), list(bad_values()))
def test_bad_values_are_refused_by_name(name, value):
    if isinstance(flatten(RunConfig())[name], tuple):
        value = (300, value)
    with pytest.raises(ConfigError, match=rf"^{name} is .*; it must be (at least|above) \S+"):
        change(RunConfig(), name, value).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("td3.discount", 1.0),
        ("td3.discount", 0.0),
        ("td3.tau", 1.0),
        ("td3.target_noise", 0.0),
        ("td3.policy_delay", 1),
        ("adapt.updates", 0),
        ("adapt.prox_coef", 0.0),
        ("propensity.log_odds_clip", 0.0),
        ("network.hidden_sizes", (1,)),
    ],
)
def test_the_ends_of_closed_bounds_are_valid(name, value):
    change(Config(), name, value).validate()


def test_every_number_has_a_bound():
    """So that a new field cannot be forgotten; words, choices among them and of yes and no have
    none, and ranges are checked against the family. Where a word may stand in a number's place
    there is one for the number.
    """
    numbers = {
        name
        for name, value in flatten(RunConfig()).items()
        if not isinstance(value, bool | str) and not name.endswith(("_ranges", "tags"))
    }
    worded = {
        name for name, value in flatten(RunConfig()).items() if isinstance(value, str)
    } & numeric(RunConfig())
    assert worded == {"p3o.clip", "p3o.kl_coef"}
    assert set(bounds(RunConfig())) == numbers | worded


def test_every_setting_is_of_one_kind():
    kinds = [flatten(RunConfig(), kind) for kind in Kind]
    assert sum(map(len, kinds)) == len(flatten(RunConfig()))
    learned, measured, host = kinds
    assert {"td3.tau", "task", "seed", "tasks.held_out", "checkpoint.replay"} <= learned.keys()
    assert {"adapt.prox", "evaluate.episodes", "train.rounds_per_cycle"} <= measured.keys()
    assert {"tracking.wandb", "checkpoint.minutes", "runs", "train.env_steps"} <= host.keys()
    assert identity(RunConfig()) == learned


def test_history_must_be_shorter_than_the_replay_of_a_row():
    config = Config()
    for name, value in (
        ("collect.rows", 4),
        ("collect.unroll", 10),
        ("collect.warmup_steps", 40),
        ("collect.replay_capacity", 80),  # 20 slots a row
        ("network.history_length", 20),
    ):
        config = change(config, name, value)
    with pytest.raises(ConfigError, match="history_length is 20; it must be below the 20"):
        config.validate()
    change(config, "network.history_length", 19).validate()


def test_rows_must_be_shared_equally_by_the_tasks():
    with pytest.raises(ConfigError, match=r"collect.rows is 32; .* 3 training tasks"):
        change(Config(), "tasks.train", 3).validate()
    change(Config(), "tasks.train", 8).validate()


def test_the_classifier_needs_a_feature():
    config = change(Config(), "network.context_size", 0)
    with pytest.raises(ConfigError, match=r"^propensity\.observation is False"):
        config.validate()
    change(config, "propensity.observation", True).validate()


def test_a_network_needs_a_layer():
    with pytest.raises(ConfigError, match="hidden_sizes is empty"):
        change(Config(), "network.hidden_sizes", ()).validate()


def test_what_contexts_see_and_tell_needs_what_it_stands_on():
    seeing = change(change(Config(), "network.normalize", True), "network.changes", True)
    seeing.validate()
    telling = change(Config(), "network.task_head", True)
    telling.validate()
    blind = {"network.context_size": 0, "propensity.observation": True}
    for config, changes, said in (
        (seeing, {"network.normalize": False}, r"network\.changes is True; it needs"),
        (seeing, {"collect.unroll": 1}, r"collect\.unroll is 1; with network\.changes"),
        (seeing, blind, r"network\.changes is True; without a context .* must be False"),
        (telling, {"tasks.train": 1}, r"tasks\.train is 1; with network\.task_head"),
        (telling, blind, r"network\.task_head is True; without a context .* must be False"),
    ):
        with pytest.raises(ConfigError, match=said):
            replaced(config, changes).validate()


def test_replay_slots_are_whole_unrolls():
    """10 rows in unrolls of 7: 100 slots a row would not be, 98 are."""
    config = Config()
    for name, value in (
        ("collect.rows", 10),
        ("collect.unroll", 7),
        ("collect.replay_capacity", 1000),
        ("train.updates_per_round", 140),
    ):
        config = change(config, name, value)
    assert config.slots_per_row == 98
    assert config.steps_per_round == 70
    assert config.update_to_data == 2.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-60, 1e40])
def test_numbers_are_what_they_are_in_32_bits(value):
    """A learning rate of 1e-60 is 0 on the device, one of 1e40 infinite."""
    with pytest.raises(ConfigError, match=r"td3\.learning_rate is"):
        change(Config(), "td3.learning_rate", value).validate()


def test_warm_up_must_fit_into_the_run_and_the_replay():
    """A round is 1,600 steps: 7 are the 10,000 of warm-up, and there must be one more."""
    with pytest.raises(ConfigError, match=r"train.env_steps is 11200; it must be above the 11200"):
        change(Config(), "train.env_steps", 11_200).validate()
    change(Config(), "train.env_steps", 11_201).validate()
    with pytest.raises(ConfigError, match=r"collect.warmup_steps is 10000; it must fit .* 9600"):
        change(Config(), "collect.replay_capacity", 9600).validate()


def test_updates_are_counted_in_32_bits_and_steps_are_not():
    """Steps are counted in rounds."""
    long = change(Config(), "train.env_steps", 8_000_000_000)
    long.validate()
    with pytest.raises(ConfigError, match=r"that is 2,499,996,500 updates, and at most 2,147"):
        change(long, "train.updates_per_round", 500).validate()
    with pytest.raises(ConfigError, match=r"in rounds of 1600 that is 2,187,500,000, and at most"):
        change(long, "train.env_steps", 3_500_000_000_000).validate()


def test_a_batch_of_adaptation_is_counted_in_32_bits():
    large = change(Config(), "adapt.batch_multiple", 2**31 // 256)
    with pytest.raises(ConfigError, match=r"^adapt.batch_multiple is 8388608; .* 2,147,483,648 tr"):
        large.validate()
    change(large, "adapt.batch_multiple", 2**31 // 256 - 1).validate()


def test_configurations_are_hashable():
    """They are closed over by compiled functions."""
    assert hash(Config()) == hash(Config())
    assert Config() != change(Config(), "td3.tau", 0.01)


def test_a_run_from_before_a_setting_was_renamed_is_read():
    kept = Path(__file__).parent.parent / "experiments/results/quick/ant_dir.config.json"
    values = json.loads(kept.read_text())["config"]
    assert values["adapt"]["step2_updates"] == 40
    adapt = from_json(json.dumps(values)).adapt
    # It adapts as it did, whatever the defaults are now.
    assert (adapt.updates, adapt.new_share, adapt.exploration_noise) == (40, 0.0, 0.0)
    values["td3"]["tau"] = 0.01
    assert from_json(json.dumps(values)).adapt.tau == 0.01
    with pytest.raises(ConfigError, match="adapt is 3"):
        from_json(json.dumps(values | {"adapt": 3}))
    values["adapt"]["step3_updates"] = 1
    with pytest.raises(ConfigError, match=r"there is no setting adapt.step3_updates"):
        from_json(json.dumps(values))
