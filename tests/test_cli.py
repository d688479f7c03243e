"""The command line as a user meets it: a whole run, its directory, and every kind of mistake."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
import jmql
from experiments import cli, memory, presets, run, terminal, tracking
from experiments.config import from_json
from experiments.figures import __main__ as figures
from experiments.figures import goals as goals_figure
from tests import tiny

SMALL = (
    "--network.hidden-sizes 16 --network.context-size 4 --network.history-length 5"
    " --td3.batch-size 16 --collect.rows 4 --collect.unroll 50 --collect.warmup-steps 200"
    " --collect.replay-capacity 2000 --train.env-steps 800 --train.updates-per-round 4"
    " --train.rounds-per-cycle 2 --adapt.step1-updates 2 --adapt.updates 2"
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
    "adapt/failed",
    "time/env_steps_per_second",
    "time/updates_per_second",
    "time/compile_seconds",
}
LEARNING = {"train/critic_loss", "train/actor_loss", "train/q", "train/weight_norm"}


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = ("WANDB_MODE", "WANDB_API_KEY", "XDG_CACHE_HOME")
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
    page = f"{where}/report.html"
    assert last == f"run: {where} · report: {page} · next: make evaluate RUN={where}"
    assert (cwd / page).exists()
    assert "updates per environment step" in done.stdout
    assert "bytes each" in done.stdout
    assert "W&B: offline" in done.stdout
    assert not (run / "log.txt").exists()
    assert [path.name for path in cwd.iterdir() if not path.name.startswith(".")] == ["runs"]


def test_compiled_programs_are_kept_for_next_time(tmp_path):
    folder = "JAX_COMPILATION_CACHE_DIR"
    others = {k: v for k, v in os.environ.items() if k not in (folder, "XDG_CACHE_HOME")}
    code = "import experiments, jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=others | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / ".cache/jmql/xla")


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
    (sent,) = (run / "wandb").glob("offline-run-*-s5/files/media/html/report*.html")
    assert sent.read_bytes() == (run / "report.html").read_bytes()

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["env_steps"]) for row in rows] == [
        (5, 200), (6, 200), (5, 600), (6, 600), (5, 800), (6, 800),
    ]  # fmt: skip
    assert [row["updates"] for row in rows[::2]] == [0, 8, 12]
    for row in rows:
        assert row.keys() >= METRICS
        assert row["tasks/failed"] == [0, 0, 0]
        assert np.isclose(np.mean(row["tasks/return_post"]), row["eval/return_post"])
    assert not LEARNING & rows[0].keys()  # nothing was learned in warm-up
    assert rows[-1].keys() >= LEARNING
    assert "collect/return" in rows[0]  # warm-up episodes end after 50 steps, others after 200


def test_how_points_adapt_is_drawn(finished, monkeypatch):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    trained, goals, places = goals_figure.walk(run)
    assert trained.shape == (4, 2)
    assert places.shape == (len(goals), 6, 201, 2)
    assert np.abs(places[:, :, 0]).max() <= 0.1  # the start
    assert np.abs(np.diff(places, axis=2)).max() <= 0.1 + 1e-6  # 0.1 a step
    assert len({episode.tobytes() for episode in places.reshape(-1, 201, 2)}) == 6 * len(goals)
    monkeypatch.setattr(goals_figure, "walk", lambda _: goals_figure.Walked(trained, goals, places))
    figures.main(["goals", str(run), str(cwd / "goals.png")])
    assert (cwd / "goals.png").read_bytes().startswith(b"\x89PNG")


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


def test_a_study_adapts_in_shots_and_without_each_of_its_parts(finished):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    words = "--num-tasks 3 --ranges angle 0 1 --shots 0 2 --updates 1 --ablations".split()
    done = command("evaluate", "--run", str(run), *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"tasks/return_shot1"' in line]
    ways = ["as set", "weights of one", "new data alone", "from nothing", "1 updates a shot"]
    assert [row["adapted"] for row in rows] == [way for way in ways for _ in range(2)]
    for way in ("before", "shot 2", "gain", *ways):
        assert way in done.stdout
    assert rows[0]["measured"]["adapt.shots"] == 2
    assert [row["measured"]["adapt.updates"] for row in rows[::2]] == [2, 2, 2, 2, 1]
    assert rows[2]["measured"]["adapt.reuse"] == "uniform"
    assert np.array(rows[0]["tasks/reuse"]).shape == (3, 4)
    x, y = np.array(rows[0]["tasks/parameters"]["goal"]).T
    assert ((np.arctan2(y, x) >= 0) & (np.arctan2(y, x) <= 1)).all()
    for words, said in {
        ("--shots", "-1"): "shots is (-1,); it must be at least 0",
        ("--ranges", "velocity", "0", "1"): "point_goal draws no 'velocity'; valid: angle",
        ("--oracle", str(run)): "whose observe_task is False; valid: a run whose observe_task is",
    }.items():
        done = command("evaluate", "--run", str(run), *words, cwd=cwd)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_run_becomes_one_file_that_acts_and_adapts(finished, tmp_path):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    done = command("export", "--run", str(run), "--out", "point.jmql", "--seed", "6", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'policy: point.jmql · next: jmql.load("point.jmql")'
    policy = jmql.load(cwd / "point.jmql")
    assert policy.about["env_steps"] == 800
    assert policy.about["seed"] == 6
    carry, episode = policy.start(), jmql.Episode(np.zeros((6, 2)), np.ones((5, 2)), np.ones(5))
    assert policy.act(np.zeros(2), carry)[0].shape == (2,)
    assert policy.adapt([episode])[0].agent.updates > policy.agent.updates
    for words, said in {
        ("--seed", "7"): "seed is 7; valid: one of",
        ("--out", "nowhere/x"): "nowhere/x cannot be written",
    }.items():
        done = command("export", "--run", str(run), "--out", "x", *words, cwd=cwd)
        assert done.returncode == (2 if "--seed" in words else 1)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_what_is_measured_may_vary_on_a_trained_run(finished):
    cwd, _ = finished
    (run,) = cwd.glob("runs/point_goal/*")
    idle = ("--adapt.step1-updates", "0", "--adapt.updates", "0", "--evaluate.episodes", "3")
    done = command("evaluate", "--run", str(run), "--num-tasks", "2", *idle, cwd=cwd)
    assert done.returncode == 0, done.stderr
    row = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert row["tasks/return_pre"] == row["tasks/return_post"]
    assert row["measured"]["adapt.updates"] == 0
    assert row["measured"]["evaluate.episodes"] == 3
    for words, said in {
        ("--adapt.prox-coef", "nan"): "adapt.prox_coef is nan; it must be",
        ("--td3.tau", "0.1"): "unknown flag --td3.tau",
        ("--num-taks", "3"): "did you mean --num-tasks?",
        ("--num-tasks", "0"): "num_tasks is 0; it must be at least 1",
        ("--num-tasks", "1000000000"): "GB of memory and",
    }.items():
        done = command("evaluate", "--run", str(run), *words, cwd=cwd)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


TRAIN = ("train", "--task", "point_goal")
HUGE_ROWS = ("--collect.rows", "1000000000", "--tasks.train", "1000000000")
HUGE_ROWS += ("--collect.replay-capacity", "2000000000", "--collect.unroll", "2")
HUGE_ROWS += ("--network.history-length", "1", "--train.env-steps", "4000000000")
HUGE_BATCH = ("--td3.batch-size", "1000000000", "--adapt.batch-multiple", "1")
HUGE_BATCH += ("--adapt.updates", "0")
MISTAKES = {
    (): "train",
    ("trian",): "did you mean train?",
    ("train",): "no task given; valid: ant, ant_dir",
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
    (*TRAIN, "--seeds", "0"): "seeds is 0; it must be at least 1",
    (
        *TRAIN,
        "--network.task-head",
        "--tasks.train",
        "1",
    ): "tasks.train is 1; with network.task_head",
    ("train", "--task", "ant", "--network.task-head", "--tasks.train", "2"): "; ant is one task",
    (*TRAIN, "--run-id", "../x"): "run_id is '../x'; it must be a name",
    (*TRAIN, "--split", "odd"): "point_goal has no split 'odd'; did you mean ood? valid: iid, ood",
    ("train", "--task", "cheetah_dir", "--split", "ood"): "no split 'ood'; valid: iid",
    (*TRAIN, "--tasks.train-ranges", "angel", "0", "1"): "draws no 'angel'; valid: angle",
    (*TRAIN, "--tasks.held-out-ranges", "angle", "1", "1"): "angle is 1 to 1; it must rise",
    (*TRAIN, "--tasks.train-ranges", "angle", "1", "1.00000001"): "angle is 1 to 1; it must rise",
    (*TRAIN, "--tasks.train-ranges", "angle", "-inf", "3"): "angle is -inf to 3; valid: within",
    (*TRAIN, "--tasks.train-ranges", "angle", "nan", "3"): "angle is nan to 3; valid: within",
    (*TRAIN, "--tasks.held-out-ranges", "angle", "0", "1e39"): "angle is 0 to 1e+39; valid: within",
    (*TRAIN, "--tasks.train-ranges", "angle", "0", "1", "angle", "2", "3"): "angle is given twice",
    ("train", "--task", "ant_goal", "--tasks.train-ranges", "radius", "-3", "1"): "within 0 to 10",
    ("train", "--task", "nowhere:Family"): "task family 'nowhere:Family' cannot be imported from",
    (*TRAIN, "--seed", "-1"): "seed is -1",
    (*TRAIN, "--seed", "4294967296"): "seed is 4294967296",
    (*TRAIN, "--seed", "4294967295", "--seeds", "2"): "seed is 4294967295 and seeds is 2",
    (*TRAIN, "--tasks.seed", "4294967296"): "tasks.seed is 4294967296; it must be",
    (*TRAIN, "--seed", "9" * 20): "seed is 9999",
    (*TRAIN, "--td3.policy-delay", "3000000000"): "td3.policy_delay is 3000000000; it must be",
    (*TRAIN, "--td3.learning-rate", "inf"): "td3.learning_rate is inf; it must be",
    (*TRAIN, "--adapt.prox-coef", "1e400"): "adapt.prox_coef is inf; it must be",
    (*TRAIN, "--collect.exploration-noise", "nan"): "collect.exploration_noise is nan; it must be",
    (*TRAIN, "--train.env-steps", "1000"): "it must be above the 3200 of warm-up",
    (*TRAIN, "--tasks.held-out", "1000000000"): "GB of memory and",
    (*TRAIN, "--seeds", "1000000000"): "GB of memory and",
    (*TRAIN, *HUGE_ROWS): "GB of memory and",
    (*TRAIN, *HUGE_BATCH): "training (td3.batch_size) ",
    (*TRAIN, "--adapt.batch-multiple", "2147483647"): "adapt.batch_multiple is 2147483647; with",
    (*TRAIN, "--adapt.batch-multiple", "16000000"): "and a batch (adapt.batch_multiple, td3",
    (
        *TRAIN,
        "--adapt.episodes",
        "1000000000",
    ): "adapt.shots is 1 and adapt.episodes 1000000000; in e",
    (*TRAIN, "--adapt.episodes", "1000000"): "new data of 16 held-out tasks (adapt.sho",
    (*TRAIN, "--evaluate.episodes", "2147483647"): "evaluate.episodes, evaluate.history",
    (*TRAIN, "--evaluate.history-length", "2147483647"): "evaluate.episodes, evaluate.history",
    ("bench", "--repeats", "0"): "repeats is 0; it must be at least 1",
    ("bench", "--out", "/dev/null/x"): "out is /dev/null/x; it must be a folder",
    ("evaluate",): "--run",
    ("evaluate", "--run", "nowhere"): "nowhere is not a run directory",
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


def test_an_evaluation_that_cannot_be_is_one_line_before_anything_is_read(
    tmp_path, monkeypatch, capsys
):
    """The run has no checkpoint."""
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    folder = run.create(tiny.build(dataclasses.replace(tiny.CONFIG, runs=str(tmp_path))))
    before = sorted(folder.iterdir())
    for words, said in {
        ("--adapt.batch-multiple", "2147483647"): "adapt.batch_multiple is 2147483647; with td3.ba",
        ("--adapt.batch-multiple", "130000000"): "and a batch (adapt.batch_multiple, td3.batch",
        ("--adapt.episodes", "1000000000"): "adapt.shots is 1 and adapt.episodes 1000000000; in e",
        ("--adapt.episodes", "11000000"): "adapt.shots is 1 and adapt.episodes 11000000; in epi",
        ("--evaluate.episodes", "2147483647"): "episodes of 32 held-out tasks (adapt.episodes, ev",
        (
            "--num-tasks",
            "1",
            "--adapt.episodes",
            "5000000",
        ): "new data of 1 held-out tasks (adapt.shots, adapt.",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["evaluate", "--run", str(folder), *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert said in line
    assert sorted(folder.iterdir()) == before


def test_help_of_every_command_is_no_mistake(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    for words in (
        ["train", "--help"],
        ["evaluate", "--help"],
        ["export", "-h"],
        ["bench", "-h"],
        ["--help"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        assert "usage" in "".join(capsys.readouterr())


def test_an_interrupt_says_so(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "jmql: interrupted\n"


def test_paths_are_shown_as_they_are(capsys):
    """Rich would read styles and faces in them."""
    terminal.console.print("runs[v2]/e:car:x/a[/b]", soft_wrap=True)
    terminal.table("[bold]", ["[red]"], [(":car:", ["[/b]"])])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("runs[v2]/e:car:x/a[/b]", "[bold]", "[red]", ":car:"))


def test_troubles_are_shown(capsys):
    env = envs.make("point_goal", episode_length=10)
    terminal.warn_of_troubles(0, 0, 0, [[0, 0]], ["a", "b"], env)
    assert capsys.readouterr().out == ""
    terminal.warn_of_troubles(2, 1, 1, [[0, 1], [0, 0]], ["a", "b"], env)
    assert capsys.readouterr().out == (
        "note: 2 training episodes blew up, 1 evaluation episode blew up, 1 adaptation failed;"
        " every step that an episode had left counts as -30, the return of a failed adaptation as"
        " -300; failed on b\n"
    )


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


PROFILES = ["quick", "tuned", "paper"]


@pytest.mark.parametrize("algorithm", ["mql", "p3o"])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_preset_is_valid(profile, algorithm):
    assert {name: list(table) for name, table in presets.ALGORITHMS.items()} == {
        "mql": PROFILES,
        "p3o": PROFILES,
    }
    assert {*presets.tasks("quick", "p3o")} == {*envs.FAMILIES}
    for task in presets.tasks(profile, algorithm):
        config = presets.preset(task, profile, algorithm)
        assert (config.task, config.profile, config.algorithm) == (task, profile, algorithm)
        config.validate()
        assert config.total_rounds > 4 * config.train.rounds_per_cycle
        stored = json.dumps(dataclasses.asdict(config))
        assert from_json(stored) == config


def test_paper_presets_have_the_reference_update_to_data_ratio():
    ratios = {task: presets.preset(task, "paper").update_to_data for task in presets.tasks("paper")}
    dirs = {"cheetah_dir": 2.5, "ant_dir": 1.0, "humanoid_dir": 2.5}
    assert ratios == dirs | {"cheetah_vel": 1.0, "ant_goal": 0.2, "walker_params": 0.2}


def test_numbers_for_people():
    assert terminal.human_time(3723) == "1:02:03"
    assert terminal.human_time(59.6) == "1:00"
    assert memory.human_bytes(190e6) == "190 MB"
    assert memory.human_bytes(7.25e9) == "7.2 GB"
