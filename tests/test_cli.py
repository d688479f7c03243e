"""The command line as a user meets it: a whole run, its directory, and every kind of mistake."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, presets, terminal, tracking
from jmql.config import validate

SMALL = (
    "--network.hidden-sizes 16 --network.context-size 4 --network.history-length 5"
    " --td3.batch-size 16 --collect.rows 4 --collect.unroll 50 --collect.warmup-steps 200"
    " --collect.replay-capacity 2000 --train.env-steps 800 --train.updates-per-round 4"
    " --train.rounds-per-cycle 2 --adapt.step1-updates 2 --adapt.step2-updates 2"
    " --adapt.batch-multiple 1 --tasks.train 4 --tasks.held-out 3 --propensity.newton-steps 5"
).split()
METRICS = {
    "eval/return_pre",
    "eval/return_step1",
    "eval/return_post",
    "eval/return_post_p20",
    "eval/blew_up",
    "collect/blew_up",
    "adapt/ess",
    "adapt/beta_mean",
    "adapt/beta_zero_share",
    "adapt/classifier_accuracy",
    "adapt/prox_coef",
    "time/env_steps_per_second",
    "time/updates_per_second",
    "time/compile_seconds",
}
LEARNING = {"train/critic_loss", "train/actor_loss", "train/q"}


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = ("WANDB_MODE", "WANDB_API_KEY", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    clean = {k: v for k, v in os.environ.items() if k not in settings}
    return subprocess.run(
        [sys.executable, "-m", "experiments.cli", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=clean | {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(cwd)} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of two seeds with W&B in its own choice of mode: no key here, so offline."""
    cwd = tmp_path_factory.mktemp("user")
    words = ["train", "--task", "point_goal", "--seed", "5", "--seeds", "2", *SMALL]
    return cwd, command(*words, cwd=cwd)


def test_a_run_ends_well_and_says_where_it_is(finished):
    cwd, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning of a library in the user's face
    (run,) = cwd.glob("runs/point_goal/*")
    last = done.stdout.strip().splitlines()[-1]
    where = run.relative_to(cwd)
    assert last == f"run: {where} · next: make evaluate RUN={where}"
    assert "updates per environment step" in done.stdout
    assert "bytes each" in done.stdout
    assert "W&B: offline" in done.stdout
    assert not (run / "log.txt").exists()
    assert [path.name for path in cwd.iterdir() if not path.name.startswith(".")] == ["runs"]


def test_compiled_programs_are_kept_for_next_time(finished):
    cwd, _ = finished
    assert any(path.name.startswith("jit_cycle") for path in cwd.glob(".cache/jmql/xla/*"))


def test_the_run_directory_is_the_contract(finished):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["td3"]["batch_size"] == 16
    assert record["seeds"] == [5, 6]
    assert {"git_commit", "versions", "device", "device_count", "backend"} <= record.keys()
    tasks = np.load(run / "tasks.npz")
    assert tasks["train/goal"].shape == (4, 2)
    assert tasks["held_out/goal"].shape == (3, 2)
    assert list((run / "checkpoints").iterdir())
    assert list((run / "wandb").glob("offline-run-*-s5"))

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["env_steps"]) for row in rows] == [
        (5, 200), (6, 200), (5, 600), (6, 600), (5, 800), (6, 800),
    ]  # fmt: skip
    assert [row["updates"] for row in rows[::2]] == [0, 8, 12]
    for row in rows:
        assert row.keys() >= METRICS
        assert np.isclose(np.mean(row["tasks/return_post"]), row["eval/return_post"])
    assert not LEARNING & rows[0].keys()  # nothing was learned in warm-up
    assert rows[-1].keys() >= LEARNING
    assert "collect/return" in rows[0]  # warm-up episodes end after 50 steps, others after 200


def test_evaluate_takes_any_number_of_fresh_tasks(finished):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    # One more than fits side by side: the second chunk is filled up, and cut.
    count = 33
    words = ("--num-tasks", str(count), "--split", "ood")
    done = command("evaluate", "--run", str(run), *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [json.loads(x) for x in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [5, 6]
    assert all(len(row["tasks/return_post"]) == count for row in rows)
    assert all(np.isclose(np.mean(r["tasks/return_pre"]), r["eval/return_pre"]) for r in rows)
    assert f"{count} fresh held-out tasks" in done.stdout
    assert rows[0]["ranges"] == {"angle": [0.75 * np.pi, np.pi]}


TRAIN = ("train", "--task", "point_goal")
MISTAKES = {
    (): "train",
    ("trian",): "did you mean train?",
    ("train",): "no task given; valid: ant_dir",
    ("train", "--task", "ant_dri"): "did you mean ant_dir?",
    (*TRAIN, "--profile", "quik"): "did you mean quick?",
    ("train", "--task", "humanoid_dir"): "unknown profile of humanoid_dir 'quick'; valid: paper",
    (*TRAIN, "--profile", "paper"): "unknown profile of point_goal 'paper'; valid: quick",
    (*TRAIN, "--backend", "spring"): "unknown backend of point_goal 'spring'; valid: none",
    ("train", "--task", "ant_dir", "--backend", "sprin"): "did you mean spring?",
    (*TRAIN, "--td3.learnin-rate", "1"): "did you mean --td3.learning-rate?",
    (*TRAIN, "--td3.learning-rate", "abc"): "Error parsing --td3.learning-rate",
    (*TRAIN, "--td3.learning-rate", "-1"): "td3.learning_rate is -1.0; it must be above 0",
    (*TRAIN, "--td3.batch-size", "0"): "td3.batch_size is 0; it must be at least 1",
    (*TRAIN, "--td3.batch-size"): "Missing value",
    (*TRAIN, "--adapt.prox", "es"): "('constant', 'ess')",
    (*TRAIN, "--tasks.held-out", "0"): "tasks.held_out is 0; it must be at least 1",
    (*TRAIN, "--network.history-length", "9999"): "network.history_length is 9999",
    (*TRAIN, "--seeds", "0"): "seeds is 0",
    (*TRAIN, "--split", "odd"): "point_goal has no split 'odd'; did you mean ood? valid: iid, ood",
    ("train", "--task", "cheetah_dir", "--split", "ood"): "no split 'ood'; valid: iid",
    (*TRAIN, "--tasks.train-ranges", "angel", "0", "1"): "draws no 'angel'; valid: angle",
    (*TRAIN, "--tasks.held-out-ranges", "angle", "1", "1"): "angle is 1 to 1; it must rise",
    (*TRAIN, "--seed", "-1"): "seed is -1",
    ("evaluate",): "--run",
    ("evaluate", "--run", "nowhere"): "nowhere is not a run directory",
    ("evaluate", "--run", "runs", "--num-taks", "3"): "did you mean --num-tasks?",
    ("evaluate", "--run", "runs", "--num-tasks", "0"): "num-tasks is 0",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_code_2_and_writes_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)  # it changes the process
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert len(err.strip().splitlines()) == 1
    assert MISTAKES[words] in err
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_broken_run_names_the_file_with_the_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def breaks(*_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("experiments.train.compiled", breaks)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--task", "point_goal", *SMALL])
    (log,) = tmp_path.glob("runs/point_goal/*/log.txt")
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert err.strip() == (
        f"jmql: RuntimeError: the disk is on fire; traceback in {log.relative_to(tmp_path)}"
    )
    assert "Traceback" in log.read_text()


def test_wandb_mode_is_asked_for_or_set_or_found():
    assert tracking.wandb_mode("disabled", {"WANDB_MODE": "online"}) == "disabled"
    assert tracking.wandb_mode("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}) == "offline"
    assert tracking.wandb_mode("auto", {"WANDB_API_KEY": "k"}) == "online"


def test_without_a_key_wandb_is_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking.wandb_mode("auto", {}) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking.wandb_mode("auto", {}) == "online"


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_every_preset_is_valid(profile):
    for task in presets.tasks(profile):
        config = presets.preset(task, profile)
        validate(config)
        stored = json.loads(json.dumps(dataclasses.asdict(config)))
        assert presets.from_dict(presets.RunConfig(), stored) == config


def test_paper_presets_have_the_reference_update_to_data_ratio():
    ratios = {task: presets.preset(task, "paper").update_to_data for task in presets.tasks("paper")}
    dirs = {"cheetah_dir": 2.5, "ant_dir": 1.0, "humanoid_dir": 2.5}
    assert ratios == dirs | {"cheetah_vel": 1.0, "ant_goal": 0.2, "walker_params": 0.2}


def test_numbers_for_people():
    assert terminal.human_time(3723) == "1:02:03"
    assert terminal.human_time(59.6) == "1:00"
    assert terminal.human_bytes(190e6) == "190 MB"
    assert terminal.human_bytes(7.25e9) == "7.2 GB"
