"""What a program may use of `jmql`, as the README shows it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jmql

ROOT = Path(__file__).parent.parent


def test_every_name_of_the_door_is_there():
    for name in jmql.__all__:
        assert getattr(jmql, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'mqll'"):
        jmql.mqll  # noqa: B018


def test_the_door_imports_nothing_before_it_is_asked():
    code = "import sys, jmql; assert not {'jax', 'flax'} & sys.modules.keys(); jmql.mql.learner"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_example_of_the_readme_runs():
    """In a process of its own, compiled as a user's is."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    returns = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(returns) == 4
    assert returns[-1] > returns[0] + 50  # it learns
