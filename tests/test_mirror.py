"""A run in a bucket: a machine that is lost loses nothing past the last save."""

import dataclasses
import re
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
    assert "20000" in there
    assert there <= kept
    found = {name.removeprefix(f"{mirror._root}/") for name in mirror._fs.find(str(mirror._root))}
    assert found == {*mirror.seen()["files"], "mirror.json", "started.json"}


@pytest.mark.parametrize("where", [BUCKET, "there"])
def test_files_come_back_as_they_were_whatever_they_end_with(tmp_path, storage, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.mirror._PAUSE", 0)
    ends = [b"", b"\r", b"\n", b"\r\n", b"\n\r", b"0" * 2**18 + b"\r"]
    state = tmp_path / "here/r/checkpoints/1"
    state.mkdir(parents=True)
    for i, end in enumerate(ends):
        (state / str(i)).write_bytes(end)
    mirror = Mirror(where, tmp_path / "here/r")
    mirror.fetch()
    assert mirror.finish() == ""
    shutil.rmtree(state)
    Mirror(where, tmp_path / "here/r").fetch()
    assert [(state / str(i)).read_bytes() for i in range(len(ends))] == ends


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


def test_what_fails_to_be_copied_is_tried_again_and_then_said(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.mirror._PAUSE", 0.0)
    folder, there = tmp_path / "task" / "r", tmp_path / "there"
    checkpoint = folder / "checkpoints" / "80" / "data"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("old")
    mirror = Mirror(str(there), folder)
    mirror.fetch()
    assert mirror.finish() == ""
    assert (there / "task/r/checkpoints/80/data").read_text() == "old"
    checkpoint.write_text("new")  # under the same name, after a rollback
    assert mirror.finish() == ""
    assert (there / "task/r/checkpoints/80/data").read_text() == "new"

    tries = []

    def refuse(*_):
        tries.append(1)
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(mirror._fs, "pipe_file", refuse)
        mirror.push(lambda: False)  # which says nothing
        said = mirror.finish()
    assert re.match(r".* is whole, but .* which is at 80 steps: .*no route to host; the same", said)
    assert len(tries) == 4
    # Nothing that is here is replaced by what is not further, and nothing is fetched twice.
    other = Mirror(str(there), folder)
    checkpoint.write_text("mine")
    other.fetch()
    assert checkpoint.read_text() == "mine"
    # Of two processes on one run, the one that has begun last has the bucket.
    with monkeypatch.context() as patch:
        patch.setattr("experiments.mirror._TRIES", 1)
        assert re.search("a process on .* trains this run since then", mirror.finish())
    assert other.finish() == ""


def test_a_slow_bucket_gets_the_newest_and_keeps_what_it_has(tmp_path, monkeypatch):
    folder, there = tmp_path / "task" / "r", tmp_path / "there"

    def save(step):
        path = folder / "checkpoints" / str(step) / "data"
        path.parent.mkdir(parents=True)
        path.write_text(str(step))

    mirror = Mirror(str(there), folder)
    mirror.fetch()
    save(1)
    assert mirror.finish() == ""
    for step in (2, 3):
        save(step)
    put = mirror._fs.put_file
    monkeypatch.setattr(mirror._fs, "put_file", lambda path, to: put(path, to))
    assert mirror.finish() == ""
    assert sorted(mirror.seen()["files"]) == ["checkpoints/1/data", "checkpoints/3/data"]
    shutil.rmtree(folder / "checkpoints" / "1")
    assert mirror.finish() == ""
    kept = [path.relative_to(there / "task/r") for path in (there / "task/r").rglob("*/data")]
    assert kept == [Path("checkpoints/3/data")]  # nothing is left behind to be paid for


def test_half_a_file_is_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.mirror._PAUSE", 0.0)
    folder, there = tmp_path / "task" / "r", tmp_path / "there"
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "checkpoints" / "1" / "data").write_text("whole")
    mirror = Mirror(str(there), folder)
    mirror.fetch()
    put, halves = mirror._fs.put_file, iter([b"wh", b""])

    def half(path, to):
        put(path, to)
        for content in halves:
            Path(to).write_bytes(content)
            return

    with monkeypatch.context() as patch:
        patch.setattr(mirror._fs, "put_file", half)
        assert mirror.finish() == ""  # at the third try
    assert (there / "task/r/checkpoints/1/data").read_text() == "whole"
    shutil.rmtree(folder)
    (there / "task/r/checkpoints/1/data").write_text("wh")
    monkeypatch.setattr(mirror._fs, "get_file", lambda path, to: Path(to).write_text("w"))
    with pytest.raises(RunFailed, match="checkpoints/1/data came with 1 bytes of 2"):
        Mirror(str(there), folder).fetch()
    assert not (folder / "checkpoints").exists()


def test_a_fetch_that_is_killed_is_begun_anew(tmp_path, monkeypatch):
    folder, there = tmp_path / "task" / "r", tmp_path / "there"
    for step in (1, 2):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "data").write_text(str(step))
        (folder / "metrics.jsonl").write_text(f"row {step}\n")
        mirror = Mirror(str(there), folder)
        mirror.fetch()
        assert mirror.finish() == ""
    shutil.rmtree(folder)
    moves = []
    replace = Path.replace

    def killed(path, to):
        moves.append(to)
        if len(moves) == 3:
            raise KeyboardInterrupt
        return replace(path, to)

    mirror = Mirror(str(there), folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            mirror.fetch()
    assert [path.name for path in moves] == ["metrics.jsonl", "1", "2"]
    Mirror(str(there), folder).fetch()
    assert (folder / "checkpoints/2/data").read_text() == "2"
    assert not (folder / "fetched").exists()


def test_what_is_wrong_with_a_bucket_is_one_line(tmp_path, monkeypatch):
    there = tmp_path / "there/task/r"
    there.mkdir(parents=True)
    (there / "mirror.json").write_text("{}")
    mirror = Mirror(str(tmp_path / "there"), tmp_path / "task/r")
    with pytest.raises(ConfigError, match=r"refuses: ValueError: mirror.json is not what a run"):
        mirror.fetch()
    files = '{"config.json": 0}'
    (there / "mirror.json").write_text(f'{{"steps": 1, "files": {files}, "row": null}}')
    with pytest.raises(ConfigError, match=r"refuses: FileNotFoundError: .*config.json"):
        mirror.fetch()

    def nothing(*_):
        raise TimeoutError("no answer")

    monkeypatch.setattr(mirror._fs, "pipe_file", nothing)
    with pytest.raises(RunFailed, match="does not answer: TimeoutError: no answer"):
        mirror.fetch()


def test_a_run_that_goes_on_from_within_has_the_same_place(tmp_path, monkeypatch):
    folder = tmp_path / "task" / "r"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert Mirror("gs://b/runs", Path()).url == "gs://b/runs/task/r"
