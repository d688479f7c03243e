"""A family from outside, as docs/add_a_family.md shows it: trained, evaluated, resumed."""

import json
import re
from pathlib import Path

from tests.test_cli import SMALL, command

PAGE = Path(__file__).parents[1] / "docs/add_a_family.md"


def test_a_family_from_outside_works_as_a_built_in_one_does(tmp_path):
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "class PointLine" in code
    extras = """
    def extras(self, physics, task):
        return {"success": (jnp.abs(physics[0] - task["place"]) < 0.1).astype(float)}
"""
    (tmp_path / "my_family.py").write_text(code + extras)
    named = ["train", "--task", "my_family:PointLine", "--run-id", "mine", "--split", "ood", *SMALL]
    done = command(*named, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = tmp_path / "runs" / "PointLine" / "mine"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/success_pre", "eval/success_post"} <= rows[-1].keys()
    assert "collect/success" in rows[0]  # no episode ended in the others
    assert "place +0." in done.stdout  # the held-out half of the line
    assert re.search(r"success +│ +\d\.\d\d │ +\d\.\d\d │ +\d\.\d\d │", done.stdout)
    assert done.stdout.strip().endswith("next: make evaluate RUN=runs/PointLine/mine")
    longer = command("train", "--resume", str(folder), "--train.env-steps", "1200", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    done = command("evaluate", "--run", str(folder), "--num-tasks", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"success, mean\n(.*\n)+?│ as set +│ +\d\.\d\d │", done.stdout)
    row = json.loads((folder / "evaluations.jsonl").read_text())
    assert row["env_steps"] == 1200
    assert len(row["tasks/return_post"]) == 2
    # Without its file it is refused by name.
    (tmp_path / "my_family.py").unlink()
    done = command("evaluate", "--run", str(folder), cwd=tmp_path)
    assert done.returncode == 2
    assert "task family 'my_family:PointLine' cannot be imported" in done.stderr
