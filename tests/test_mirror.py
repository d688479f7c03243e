"""A run in a bucket: a machine that is lost loses nothing past the last save."""

import dataclasses
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server

from experiments.config import RunFailed
from experiments.mirror import Mirror
from experiments.tracking import last_row
from jmql.settings import ConfigError
from tests import tiny
from tests.test_cli import SMALL
from tests.test_sweep import rows

BUCKET = "gs://bucket/some/runs"
TRAIN = [
    *("train", "--task", "point_goal", "--run-id", "r", "--tracking.wandb", "disabled", *SMALL),
    *("--train.env-steps", "20000", "--train.updates-per-round", "100"),
    *("--checkpoint.minutes", "0.02"),
]


class Storage:
    """Google Cloud Storage on this machine, which can be gone for a while."""

    def __init__(self, folder: Path):
        self._folder = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        where = {"in_memory": False, "data_dir": str(self._folder)}
        self._server = create_server("localhost", self.port, default_bucket="bucket", **where)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Iterator[Storage]:
    storage = Storage(tmp_path / "cloud")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{storage.port}")
    storage.start()
    yield storage
    storage.stop()


def start(machine: Path, *words: str) -> subprocess.Popen:
    machine.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", *TRAIN, *words],
        cwd=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def test_a_machine_that_is_lost_is_replaced_by_one_with_an_empty_disk(tmp_path, storage):
    whole = tmp_path / "whole"
    ended(start(whole))
    lost = tmp_path / "lost"
    process = start(lost, "--mirror", BUCKET)
    mirror = Mirror(BUCKET, Path("runs/point_goal/r"))
    until = time.monotonic() + 300
    while mirror.seen()["steps"] < 2000:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = mirror.seen()
    assert saved["row"]["env_steps"] >= saved["steps"]
    shutil.rmtree(lost)

    bare = tmp_path / "bare"
    process = start(bare, "--mirror", BUCKET)
    path = bare / "runs/point_goal/r"
    while not (path / "metrics.jsonl").exists() or last_row(path) == saved["row"]:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    storage.stop()  # a run does not wait for its bucket
    time.sleep(3)
    storage.start()
    said = ended(process)
    assert f"going on at {saved['steps']:,} steps" in said
    assert rows(bare) == rows(whole)  # none is missing, none is there twice
    assert mirror.seen()["steps"] == 20_000
    # What an older machine had is brought up to date, and nothing is done again.
    assert "going on at 20,000 steps" in ended(start(tmp_path / "third", "--mirror", BUCKET))
    assert rows(tmp_path / "third") == rows(whole)
    # The bucket has no more than the run directory.
    kept = {step.name for step in (path / "checkpoints").iterdir()}
    there = {name.split("/")[1] for name in mirror.seen()["files"] if "/" in name}
    assert there == kept
    found = {name.removeprefix(f"{mirror._root}/") for name in mirror._fs.find(str(mirror._root))}
    assert found == {*mirror.seen()["files"], "mirror.json", "started.json"}


def test_a_bucket_that_refuses_is_told_in_one_line_before_anything_starts(tmp_path, storage):
    process = start(tmp_path / "m", "--mirror", "gs://other/runs")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    (line,) = said.splitlines()
    assert "jmql: mirror gs://other/runs/point_goal/r refuses: " in line
    assert not list((tmp_path / "m").iterdir())


def test_what_a_mirror_must_be():
    with pytest.raises(ConfigError, match=r"mirror is gss://x: .*; valid: gs://BUCKET/FOLDER"):
        Mirror("gss://x", Path("runs/task/r"))
    with pytest.raises(ConfigError, match="run_id is empty; it must be a name"):
        dataclasses.replace(tiny.CONFIG, mirror=BUCKET).validate()


class Files:
    """Checkpoints of which one is complete."""

    saving = False

    def steps(self):
        return [80]


def test_what_fails_to_be_copied_is_tried_again_and_then_said(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.mirror._PAUSE", 0.0)
    folder, there = tmp_path / "task" / "r", tmp_path / "there"
    checkpoint = folder / "checkpoints" / "80" / "data"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("old")
    mirror = Mirror(str(there), folder)
    mirror.fetch()
    mirror.finish(Files())
    assert (there / "task/r/checkpoints/80/data").read_text() == "old"
    checkpoint.write_text("new")  # under the same name, after a rollback
    mirror.finish(Files())
    assert (there / "task/r/checkpoints/80/data").read_text() == "new"

    tries = []

    def refuse(*_):
        tries.append(1)
        raise OSError("no route to host")

    said = r"is whole, but .* which is at 80 steps: .*no route to"
    with monkeypatch.context() as patch:
        patch.setattr(mirror._fs, "pipe_file", refuse)
        mirror.push(Files())  # which says nothing
        with pytest.raises(RunFailed, match=said):
            mirror.finish(Files())
    assert len(tries) == 4
    # Nothing that is here is replaced by what is not further, and nothing is fetched twice.
    other = Mirror(str(there), folder)
    checkpoint.write_text("mine")
    other.fetch()
    assert checkpoint.read_text() == "mine"
