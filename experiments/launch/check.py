"""Asks SkyPilot's own parser about the job files: run it with the Python of SkyPilot's environment.

uv tool install 'skypilot[gcp]==0.14.*'     # 600 MB
"$(uv tool dir)/skypilot/bin/python" experiments/launch/check.py
"""

from pathlib import Path

import sky
import yaml

GIVEN = [("JMQL_BUCKET", "gs://bucket"), ("JMQL_COMMAND", "jmql train")]

for path in sorted(Path(__file__).parent.glob("*.yaml")):
    job = yaml.safe_load(path.read_text(encoding="utf-8"))
    (one,) = sky.Task.from_yaml_config(job, env_overrides=GIVEN).resources
    assert one.use_spot
    assert one.job_recovery["recover_on_exit_codes"] == [33]
    print(path.name, *one.accelerators, one.accelerator_args["runtime_version"])
