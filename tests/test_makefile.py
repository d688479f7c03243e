"""The Makefile in a folder of its own, with a script in place of Python: nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Python, the one in .venv and, once it is installed, jmql. `venv` fails until there is a file
# `ensurepip`, once it has made the interpreter; pip is a file beside that.
FAKE = """#!/bin/sh
bin=$(dirname "$0")
[ "${0##*/}" = jmql ] && exec printf '%s\\n' "$@"
echo "$*" >> calls
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp ensurepip .venv/bin/pip ;;
  "-m pip --version") [ -e "$bin/pip" ] ;;
  "-m pip install --quiet --upgrade pip") [ -e "$bin/pip" ] && [ ! -e offline ] ;;
  "-m pip install"*) [ -e "$bin/pip" ] && cp "$0" "$bin/jmql" ;;
esac
"""
OURS = {"ALGO", "ARGS", "DEVICE", "PROFILE", "PYTHON", "RESUME", "RUN", "SEED", "SEEDS", "TASK"}
OURS |= {"VENV"}
FLAGS = {"ALGO": "algorithm"}  # others are called as the variable is
ODD = """a b  c's "d" $e $(shell touch f) `g` #h, \\i;* $(j"""


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copy(Path(__file__).parents[1] / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock", "ensurepip"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Not what the `make test` around this was given.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in OURS}
    return subprocess.run(
        ["make", "PYTHON=./python", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env=clean | environment,
        check=False,
    )


def calls(folder: Path) -> str:
    return (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("command", "name"),
    [("train", x) for x in ("TASK", "ALGO", "PROFILE", "SEED", "SEEDS", "RESUME")]
    + [("evaluate", "RUN"), ("export", "RUN"), ("export", "OUT")],
)
def test_a_value_arrives_as_it_was_given(folder, command, name):
    assert make(folder, command).stdout.splitlines()[-1] == command  # no flag without a value
    flag = FLAGS.get(name, name.lower())
    for words, environment in (([f"{name}={ODD}"], {}), ([], {name: ODD})):
        done = make(folder, command, *words, "ARGS=--more '1 2'", **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [command, f"--{flag}", ODD, "--more", "1 2"]
    assert not (folder / "f").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda12", "rocm"])
def test_another_device_is_refused_before_anything_is_set_up(folder, device):
    for words in (["train"], ["-n", "train"], ["evaluate"], ["bench"]):
        done = make(folder, *words, f"DEVICE={device}")
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert f"DEVICE is {device}; " in done.stderr
        assert "valid: cpu, cuda (NVIDIA GPUs), tpu" in done.stderr
        assert ("did you mean cuda?" in done.stderr) == (device != "rocm")
    assert not (folder / "calls").exists()
    for words in (["help"], ["-n", "test"]):
        assert make(folder, *words, f"DEVICE={device}").returncode == 0


@pytest.mark.parametrize(
    ("device", "what"), [("cpu", ".[report]"), ("cuda", ".[report,cuda]"), ("tpu", ".[report,tpu]")]
)
def test_a_device_chooses_its_extra(folder, device, what):
    assert make(folder, "train", f"DEVICE={device}").returncode == 0
    assert calls(folder).endswith(f" --editable {what}\n")


def test_a_half_made_environment_is_mended(folder):
    (folder / "ensurepip").rename(folder / "missing")
    for _ in range(2):
        assert make(folder, "train").returncode == 2
        assert (folder / ".venv" / "bin" / "python").exists()
    (folder / "missing").rename(folder / "ensurepip")
    done = make(folder, "train", "TASK=ant_dir")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["train", "--task", "ant_dir"]
    before = calls(folder)
    assert make(folder, "train").returncode == 0
    assert calls(folder) == before  # set up once


def test_a_python_of_another_try_is_replaced(folder):
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python3.10").symlink_to("/nowhere")
    (folder / ".venv" / "bin" / "python").symlink_to("python3.10")
    assert make(folder, "train").returncode == 0


def test_without_the_newest_pip_it_goes_on_the_second_time(folder):
    (folder / "offline").touch()
    assert make(folder, "train").returncode == 2
    assert make(folder, "train").returncode == 0


def test_a_healthy_environment_without_the_stamp_is_left_alone(folder):
    assert make(folder, "train").returncode == 0
    (folder / "calls").unlink()
    (folder / ".venv" / ".created").unlink(missing_ok=True)
    assert make(folder, "train").returncode == 0
    assert not (folder / "calls").exists() or calls(folder) == "-m pip --version\n"
