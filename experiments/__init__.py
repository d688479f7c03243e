"""The outside world: command line, disk, tracking and benchmarks."""

import logging
import os
from pathlib import Path

# JAX and XLA read these when they are first imported, which is after this file.
_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jmql" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Orbax warns of what is meant: reading without writing, and waiting for a save.
logging.getLogger("absl").setLevel(logging.ERROR)
