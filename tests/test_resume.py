"""Runs that stop and go on, as a user meets them: real processes, real signals."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    cli,
    evaluate,
    guard,
    loop,
    memory,
    population,
    program,
    run,
    tracking,
    train,
)
from experiments.config import CheckpointConfig, RunConfig, RunFailed, Study, TrackingConfig
from experiments.mirror import Mirror
from experiments.places import Place
from experiments.stop import Stop
from jmql.settings import ConfigError
from tests import tiny
from tests.test_checkpoint import TORN
from tests.test_cli import SMALL, command

# Long enough to be caught in the middle.
LONG = [*SMALL, "--train.env-steps", "3000", "--train.updates-per-round", "400"]
LONG += ["--network.no-normalize"]  # as in `paper`; other tests of whole runs have it
LONG += ["--tracking.wandb", "disabled"]
TRAIN = ["train", "--task", "point_goal", "--seeds", "2", *LONG]


def rows(folder: Path) -> list[dict]:
    """The record without what a clock says."""
    kept = tracking.read(folder)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in kept]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("user")


@pytest.fixture(scope="module")
def straight(cwd) -> list[dict]:
    """The record of a run that nothing stopped."""
    done = command(*TRAIN, "--runs", "straight", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return rows(next(cwd.glob("straight/point_goal/*")))


def start(cwd: Path, *words: str) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own, as a terminal does."""
    # Where these tests themselves run under nohup, what it ignores would be inherited.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.cli", *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(cwd)},
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed")


def test_a_killed_run_resumes_bit_for_bit(cwd, straight):
    """The only checkpoint is that of warm-up; rows of later cycles were written, and are redone."""
    process = start(cwd, *TRAIN, "--runs", "killed", "--checkpoint.minutes", "60")
    wait_for(process, "1,000/3,000")
    process.kill()
    process.communicate()
    (folder,) = cwd.glob("killed/point_goal/*")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["200"]
    assert tracking.read(folder)[-1]["env_steps"] >= 1000
    done = command("train", "--resume", str(folder), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "going on at 200 steps" in done.stdout
    assert rows(folder) == straight


def test_a_signal_saves_and_the_run_resumes_bit_for_bit(cwd, straight):
    process = start(cwd, *TRAIN, "--runs", "stopped", "--train.env-steps", "2200")
    wait_for(process, "600/2,200")
    (folder,) = cwd.glob("stopped/point_goal/*")
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 33
    assert "saving after the cycle in flight" in said
    where = folder.relative_to(cwd)
    assert said.strip().endswith(f"run: {where} · next: make train RESUME={where}")
    reached = tracking.read(folder)[-1]["env_steps"]
    assert (folder / "checkpoints" / str(reached)).exists()
    # Ctrl-C once more on the way, then to the end.
    process = start(cwd, "train", "--resume", str(where))
    wait_for(process, "left")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 33
    # To the end, which may be a later one than it was.
    longer = ("--train.env-steps", "3000")
    assert command("train", "--resume", str(where), *longer, cwd=cwd).returncode == 0
    assert rows(folder) == straight


def test_the_same_command_again_goes_on(cwd, straight):
    """Which is what exit code 33 promises, where the run has a name."""
    named = (*TRAIN, "--run-id", "a.name")
    process = start(cwd, *named)
    wait_for(process, "600/3,000")
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode == 33
    done = command(*named, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "going on at" in done.stdout
    folder = cwd / "runs" / "point_goal" / "a.name"
    assert rows(folder) == straight
    # What it learns under cannot become another.
    done = command(*named, "--td3.tau", "0.1", cwd=cwd)
    assert done.returncode == 2
    assert "td3.tau is 0.005 in runs/point_goal/a.name and cannot become 0.1" in done.stderr
    # A process that died while it made the directory is no reason to refuse the name.
    (folder / "config.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    short = ("--train.env-steps", "400")
    assert command(*named, *short, cwd=cwd).returncode == 0
    assert tracking.read(folder)[-1]["env_steps"] == 400


def test_a_second_ctrl_c_exits_at_once(cwd):
    endless = ("--train.rounds-per-cycle", "1000000", "--train.env-steps", "200000000")
    process = start(cwd, *TRAIN, "--runs", "twice", *endless)
    wait_for(process, "200/200,000,000")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, "saving after the cycle in flight")
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert time.monotonic() - begun < 5
    assert "go on with: make train RESUME=" in said


def test_a_signal_while_compiling_loses_nothing(cwd):
    process = start(cwd, *TRAIN, "--runs", "compiling", "--td3.tau", "0.123")
    wait_for(process, "writing to")
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 33
    (folder,) = cwd.glob("compiling/point_goal/*")
    assert f"nothing is lost; go on with: make train RESUME={folder.relative_to(cwd)}" in said


def test_a_signal_in_the_first_seconds_is_answered(cwd):
    """While Python still imports, once it has a handler at all: that of SIGHUP is the last."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process = start(cwd, *TRAIN, "--runs", "early")
        status = Path(f"/proc/{process.pid}/status")
        caught = 1 << (signal.SIGHUP - 1)
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & caught:
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, number)
        said = process.communicate()[0]
        assert process.returncode == 33
        assert said == "jmql: stopped, nothing is lost; go on with: the same command\n"
    assert not list(cwd.glob("early/*"))


def test_a_terminal_that_closes_saves_the_run(cwd):
    process = start(cwd, *TRAIN, "--runs", "hung", "--train.env-steps", "200000000")
    wait_for(process, "600/200,000,000")
    process.stdout.close()  # nobody reads what it says
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait() == 33
    (folder,) = cwd.glob("hung/point_goal/*")
    assert (folder / "checkpoints" / str(tracking.read(folder)[-1]["env_steps"])).exists()


def test_what_nohup_ignores_stays_ignored():
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_goes_away_does_not_end_the_run(cwd):
    process = start(cwd, *TRAIN, "--runs", "unread", "--train.env-steps", "2200")
    wait_for(process, "writing to")
    process.stdout.close()
    assert process.wait() == 0
    (folder,) = cwd.glob("unread/point_goal/*")
    assert tracking.read(folder)[-1]["env_steps"] == 2200
    assert "<stdout> is gone" in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run of two seeds that came to its end, although nothing was computed."""
    runs = tmp_path_factory.mktemp("whole")
    config = dataclasses.replace(tiny.CONFIG, runs=str(runs), seed=0, seeds=2)
    config = dataclasses.replace(config, tracking=TrackingConfig(wandb="disabled"))

    def cycle(state, rounds, warmup, evaluating, numbers):
        state = state.replace(rounds=state.rounds + rounds)
        return state, *tiny.measured(int(state.rounds[0]), 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compiled", lambda program: (cycle, 0.0))
        patch.setattr(memory, "of_program", lambda compiled: 0)
        assert train.train([config], Stop()) == 0
    return next(runs.glob("point_goal/*"))


def edited(row: str, changes: dict) -> str:
    """Returns a line of metrics.jsonl with other values, or, where they are None, without."""
    new = json.loads(row) | changes
    return json.dumps({name: value for name, value in new.items() if value is not None})


# What becomes of line 3 of metrics.jsonl.
LINES = {
    "torn": lambda row: row[9:],
    "endless": lambda row: "[" * 100_000,
    "a list": lambda row: "[1]",
    "counts alone": lambda row: '{"seed": 0, "env_steps": 160, "updates": 0}',
    "a count too few": lambda row: edited(row, {"updates": None}),
    "a count of text": lambda row: edited(row, {"env_steps": "160"}),
    "a return of text": lambda row: edited(row, {"eval/return_post": "x"}),
    "returns of text": lambda row: edited(row, {"tasks/return_post": ["x", 1, 2]}),
    "a number for a list": lambda row: edited(row, {"tasks/failed": 0}),
    "a list for a number": lambda row: edited(row, {"adapt/failed": [0]}),
    "a short list": lambda row: edited(row, {"tasks/failed": [0]}),
    "no blow-ups": lambda row: edited(row, {"collect/blew_up": None}),
    "no return": lambda row: edited(row, {"eval/return_pre": None}),
    "no evaluation": lambda row: json.dumps(
        {name: x for name, x in json.loads(row).items() if not name.startswith("eval/")}
    ),
}


@pytest.fixture
def copied(whole, tmp_path, monkeypatch, capsys):
    """A copy of that run, and a function that goes on with it in vain, which returns its line."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(train, "compiled", None)  # it must not come to that

    def refused(*words: str, command: str = "train", flag: str = "--resume") -> str:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, flag, str(folder), *words])
        out, error = capsys.readouterr()
        assert exit.value.code == 2
        assert out == ""
        (line,) = error.splitlines()
        return line

    return folder, refused


@pytest.mark.parametrize("damage", LINES)
def test_a_damaged_line_of_metrics_is_named(damage, copied):
    folder, refused = copied
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = LINES[damage](lines[2])
    path.write_text("\n".join(lines) + "\n")
    assert f"line 3 of {path} is damaged" in refused()


@pytest.mark.parametrize("words", [(), ("--train.env-steps", "400")])
def test_metrics_that_are_not_there_are_noticed_before_more_are_added(words, copied):
    folder, refused = copied
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    ends = f"{path} does not begin and end with rows of seeds 0 to 1, untrained and after 240 steps"
    assert ends in refused(*words)
    path.unlink()
    assert ends in refused(*words)
    path.mkdir()
    assert f"{path} cannot be read: Is a directory" in refused(*words)


def test_a_run_cannot_become_shorter_than_it_is(copied):
    folder, refused = copied
    said = f"train.env_steps is 160; {folder} is at 240 steps; valid: as many, or more"
    assert said in refused("--train.env-steps", "160")


def change(folder: Path, how) -> None:
    """Changes the settings in config.json."""
    record = json.loads((folder / "config.json").read_text())
    how(record["config"])
    (folder / "config.json").write_text(json.dumps(record))


SETTINGS = {
    "a value": ("batch_size", -5, "td3.batch_size is -5"),
    "a type": ("batch_size", "16", "td3.batch_size is '16'"),
    "a name": ("x", 1, "there is no setting td3.x"),
}


@pytest.mark.parametrize("damage", SETTINGS)
def test_a_damaged_setting_is_named(damage, copied):
    folder, refused = copied
    name, value, said = SETTINGS[damage]
    change(folder, lambda config: config["td3"].update({name: value}))
    assert f"config.json is not what a run has written: {said}" in refused()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "point_gaol"}, "no task family 'point_gaol'; did you mean point_goal?"),
        ({"backend": "spring"}, "point_goal does not run on backend 'spring'; it runs on none"),
        ({"split": "odd"}, "point_goal has no split 'odd'"),
    ],
)
def test_a_name_in_config_json_that_says_nothing_is_its_fault(settings, said, copied):
    folder, refused = copied
    change(folder, lambda config: config.update(settings))
    assert f"jmql: {folder / 'config.json'}: {said}" in refused()
    assert f"jmql: {folder / 'config.json'}: {said}" in refused(command="evaluate", flag="--run")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "{}", "\xff"])
def test_a_config_json_that_is_none_is_named(text, copied):
    folder, refused = copied
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert f"{folder / 'config.json'} is not what a run has written: " in refused()


GOALS = {
    "counts": (np.zeros((3, 2), np.float32), "of {}/config.json has written: train/goal"),
    "values": (np.full((4, 2), np.nan, np.float32), "has written: train/goal is not finite"),
}


@pytest.mark.parametrize("damage", GOALS)
def test_damaged_tasks_are_named(damage, copied):
    folder, refused = copied
    goals, said = GOALS[damage]
    path = folder / "tasks.npz"
    np.savez(path, **{"train/goal": goals, "held_out/goal": np.zeros((3, 2), np.float32)})
    assert f"{path} is not what a run " + said.replace("{}", str(folder)) in refused()
    path.write_bytes(b"")
    assert f"{path} is not what a run has written" in refused()


def test_a_program_that_does_not_fit_is_refused_after_it_is_compiled(tmp_path, monkeypatch):
    """What it takes only the compiler knows. Nothing is left of a run that was new."""
    config = dataclasses.replace(tiny.CONFIG, runs=str(tmp_path))
    monkeypatch.setattr(memory, "of_program", lambda compiled: 10**15)
    monkeypatch.setattr(train, "compiled", lambda program: (None, 0.0))
    with pytest.raises(
        ConfigError, match=r"a cycle of this run .* needs 1,000,000.0 GB of memory and .* free"
    ):
        train.train([config], Stop())
    assert not list(tmp_path.glob("*/*"))


def test_memory_of_a_program_is_what_it_computes_with():
    def spread(x):
        return jnp.sort(jnp.outer(x, x), axis=None)[:1]

    x = jax.ShapeDtypeStruct((2000,), jnp.float32)
    compiled = jax.jit(spread).lower(x).compile()
    assert 16e6 <= memory.of_program(compiled) < 200e6
    assert 10**6 < memory.there_is() < 2**60


def test_a_replay_that_takes_all_that_is_left_to_fill_is_refused(tmp_path):
    program_ = tiny.build()
    state = program_.init(program_.keys)
    train.refuse_endless_refill(program_, state)  # 2 of 6 rounds
    with pytest.raises(ConfigError, match=r"2 rounds are left, and the replay, .* takes 2 to fill"):
        train.refuse_endless_refill(program_, state.replace(rounds=state.rounds + 4))


def test_an_output_that_is_closed_is_no_reason_to_stop(cwd):
    """As `>&-` does."""
    words = [sys.executable, "-m", "experiments.cli", "train", "--help"]
    shell = " ".join(map(shlex.quote, words)) + " >&-"
    done = subprocess.run(
        shell, shell=True, cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_of_runs_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere" / "else")
    config = dataclasses.replace(tiny.CONFIG, runs=str(tmp_path / "runs"))
    with pytest.raises(RunFailed, match="no run directory can be made in"):
        run.create(tiny.build(config))


def test_what_cannot_be_written_is_one_line_and_the_numbers_are_shown(cwd, straight, tmp_path):
    """Folders in the place of the files, for root may write anywhere else."""
    (whole,) = cwd.glob("straight/point_goal/*")
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "evaluations.jsonl").mkdir()
    (folder / "log.txt").mkdir()
    done = command("evaluate", "--run", str(folder), "--num-tasks", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "on 2 fresh held-out tasks" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "evaluations.jsonl cannot be written" in line
    assert "the traceback is lost" in line
    with pytest.raises(RunFailed, match="cannot be written to: "):
        guard.refuse_unwritable(folder / "config.json")


def test_what_cannot_change_is_refused(cwd, straight, monkeypatch, capsys):
    (folder,) = cwd.glob("straight/point_goal/*")
    before = sorted(path.stat().st_mtime for path in folder.rglob("*"))
    monkeypatch.chdir(cwd)
    resume = ["train", "--resume", str(folder)]
    for words, said in {
        (*resume, "--td3.tau", "0.1"): "td3.tau is 0.005",
        (*resume, "--task", "ant_dir"): "task is point_goal",
        (*resume, "--seeds", "3"): "seeds is 2",
        (*resume, "--tracking.wandbb", "x"): "unknown flag --tracking.wandbb",
        ("train", "--resume", "nowhere"): "nowhere is not a run directory",
        ("train", "--resume"): "no run directory given",
    }.items():
        with pytest.raises(SystemExit) as exit:
            cli.main(words)
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
    assert sorted(path.stat().st_mtime for path in folder.rglob("*")) == before


@TORN
def test_damaged_checkpoints(cwd, straight):
    (folder,) = cwd.glob("straight/point_goal/*")
    newest, *_ = sorted((folder / "checkpoints").iterdir(), key=lambda path: -int(path.name))
    (newest / "state" / "_METADATA").write_text("{")
    done = command("train", "--resume", str(folder), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.name} is damaged" in done.stdout
    assert rows(folder) == straight  # the cycles since the older one were run again
    setup = run.load(folder, run.read_config(folder))
    with run.checkpoints(folder, setup.config, read_only=True) as files:
        state, step = run.restore(folder, setup, files)  # and saved again
    assert state.rounds[0] == 3000 // 200
    assert step == 3000
    for path in (folder / "checkpoints").iterdir():
        (path / "state" / "_METADATA").write_text("{")
    before = len(list((folder / "checkpoints").rglob("*")))
    with (
        run.checkpoints(folder, setup.config) as files,
        pytest.raises(RunFailed, match="can be read: step 3000"),
    ):
        run.restore(folder, setup, files)
    assert len(list((folder / "checkpoints").rglob("*"))) == before


def test_results_without_a_checkpoint_are_not_thrown_away(tmp_path):
    setup = tiny.build(dataclasses.replace(tiny.CONFIG, runs=str(tmp_path)))
    folder = run.create(setup)
    record = folder / tracking.METRICS
    record.write_text(
        '{"seed": 3, "env_steps": 80, "updates": 0}\n{"seed": 3, "env_steps": 160, "updates": 6}\n'
    )
    before = record.read_text()
    with pytest.raises(
        RunFailed, match=r"has results but no checkpoint; .* traceback in .*log.txt"
    ):
        train.train([dataclasses.replace(setup.config, resume=str(folder))], Stop())
    assert record.read_text() == before


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    with (
        guard.locked(tmp_path),
        pytest.raises(ConfigError, match="another process"),
        guard.locked(tmp_path),
    ):
        pass
    with guard.locked(tmp_path):  # and the lock is gone with its holder
        pass


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    """Even where the random part of the name is the same twice."""
    tokens = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(run.secrets, "token_hex", lambda _: next(tokens))
    setup = tiny.build(dataclasses.replace(tiny.CONFIG, runs=str(tmp_path)))
    one, two = run.create(setup), run.create(setup)
    assert one != two


def test_rows_past_the_step_and_a_torn_line_are_dropped(tmp_path):
    lines = [
        json.dumps({"seed": seed, "env_steps": step, "updates": 0})
        for step in (1, 2, 3)
        for seed in (0, 1)
    ]
    file = tmp_path / tracking.METRICS
    tracking.drop_rows(tmp_path, 2)  # there is none yet
    file.write_text("\n".join(lines) + '\n{"seed": 0, "env_st')
    tracking.drop_rows(tmp_path, 3)
    assert file.read_text() == "\n".join(lines) + "\n"
    tracking.drop_rows(tmp_path, 2)
    assert file.read_text() == "\n".join(lines[:4]) + "\n"


@pytest.mark.parametrize("name", ["train/critic_loss", "train/weight_norm"])
def test_learning_that_is_not_finite_ends_the_run_unlogged(name, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny.CONFIG, runs=str(tmp_path), seed=0, seeds=2)
    config = dataclasses.replace(config, tracking=TrackingConfig(wandb="disabled"))
    built = tiny.build(config)
    calls = []

    def cycle(state, rounds, warmup, evaluating, numbers):
        calls.append(1)
        # What is measured may be missing.
        found = {"collect/return": np.array([np.nan, 0.0]), "adapt/ess": np.array([np.nan, 1.0])}
        if len(calls) == 3:
            found[name] = np.array([0.0, np.inf])
        return state, *tiny.measured(2 * len(calls), 2, **found)

    monkeypatch.setattr(train, "compiled", lambda program: (cycle, 0.0))
    monkeypatch.setattr(memory, "of_program", lambda compiled: 0)
    monkeypatch.setattr(population, "build", lambda runs: built)
    with pytest.raises(RunFailed, match=f"{name} of seed 1 is not finite") as error:
        train.train([config], Stop())
    (folder,) = tmp_path.glob("point_goal/*")
    assert "last good checkpoint is of 80 steps" in str(error.value)
    assert str(folder / "config.json") in str(error.value)
    assert len(tracking.read(folder)) == 4  # two cycles of two seeds


def test_without_its_replay_a_run_fills_it_anew(tmp_path):
    config = dataclasses.replace(
        tiny.CONFIG,
        runs=str(tmp_path),
        tracking=TrackingConfig(wandb="disabled"),
        checkpoint=CheckpointConfig(replay=False),
    )
    setup = program.build(config)
    folder = run.create(setup)
    state = setup.init(setup.keys)
    state = state.replace(
        rounds=state.rounds + 4, memory=state.memory.replace(size=jnp.array([40]))
    )
    with run.checkpoints(folder, config) as files:
        files.save(160, run.saved(config, state))
        files.wait()
        back, _ = run.restore(folder, setup, files)
    assert back.rounds[0] == 4
    assert back.memory.size[0] == 0
    chex.assert_trees_all_equal(back.agent, state.agent)
    assert (back.actors.env_state.step == 0).all()  # the first step of a row begins an episode
    calls = []

    def cycle(state, rounds, warmup, evaluating, numbers):
        calls.append((int(rounds), bool(warmup)))
        return state, *tiny.measured(0, 1)

    longer = dataclasses.replace(setup, config=tiny.changed(train={"env_steps": 400}))
    with Stop() as stop:
        loop.loop(longer, cycle, back, tiny.lone(config), lambda *_: None, stop, 0.0)
    assert calls == [(2, True), (2, False), (2, False)]
    with pytest.raises(ConfigError, match="without its replay"):
        evaluate.evaluate(folder, config, Study(num_tasks=3))


def test_saving_by_the_clock(tmp_path):
    saves, built = [], tiny.build()

    class Files:
        def check(self): ...
        def wait(self): ...
        def saving(self): ...
        def newest(self): ...
        def save(self, step, state):
            saves.append(step)

    for minutes, expected in ((1e9, [1, 4]), (0.0, [1, 2, 3, 4])):
        saves.clear()
        config = RunConfig(checkpoint=CheckpointConfig(minutes=minutes))
        alone = dataclasses.replace(built, config=config, runs=(config,))
        save = train.saver(
            alone, [Place(alone, tmp_path, Files(), Mirror("", tmp_path))], tiny.lone(config)
        )
        for step, now in ((1, True), (2, False), (3, False), (4, True)):
            save(built.shapes, step, now)
        assert saves == expected
