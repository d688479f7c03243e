"""A copy of a run directory in a bucket, from which another machine goes on."""

import json
import logging
import os
import shutil
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from experiments import guard
from experiments.checkpoint import Checkpoints
from experiments.config import RunFailed
from experiments.tracking import last_row
from jmql.settings import ConfigError

log = logging.getLogger("jmql")

# What is in the bucket: `steps` of the newest checkpoint, `files` with the times of their last
# change, and the last `row` of results. It is written last, so that what it names is there.
_MANIFEST = "mirror.json"
_STARTED = "started.json"  # who trains there
_CHECKPOINTS = "checkpoints"
_FILES = ("config.json", "tasks.npz", "metrics.jsonl", "log.txt")  # beside the checkpoints
_TRIES, _PAUSE = 3, 10.0  # of the last copy, seconds apart; the storage's library tries more often


class Mirror:
    """The copy of one run. Without a bucket it does nothing.

    Args:
        url: a folder of a bucket such as `gs://bucket/runs`, or of another file system that fsspec
            knows; empty: there is none.
        folder: the run directory.

    Raises:
        ConfigError: there is no such kind of storage, or what it needs is not installed.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self._folder = f"{url.rstrip('/')}/{folder.parent.name}/{folder.name}", folder
        self._there: dict[str, int] = {}  # `files` of the manifest
        self._steps = -1  # of the manifest
        self._pushing: Future[str] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._fs: Any = None
        if not url:
            return
        import fsspec

        try:
            local = {} if "://" in url else {"auto_mkdir": True}
            self._fs, root = fsspec.core.url_to_fs(self.url, **local)
        except ImportError as error:
            raise ConfigError(
                f"mirror is {url}: {error}; valid: after pip install 'jmql[gcs]'"
            ) from None
        except ValueError as error:
            raise ConfigError(f"mirror is {url}: {error}; valid: gs://BUCKET/FOLDER") from None
        self._root = PurePosixPath(root)

    def fetch(self) -> None:
        """Brings what the bucket has of the run, if that is further than what is here.

        Raises:
            ConfigError: the bucket refuses, or another process trains in the directory.
        """
        if self._fs is None:
            return
        who = {"host": socket.gethostname(), "time": time.time()}
        try:
            self._fs.pipe_file(self._path(_STARTED), json.dumps(who).encode())
        except Exception as error:  # of the storage's library, whichever it is
            raise self._refuses(error) from None
        manifest = self.seen()
        self._there, self._steps = manifest["files"], manifest["steps"]
        if not manifest["files"] or self._steps <= _newest(self._folder):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with guard.locked(self._folder):
            fetched = self._folder / "fetched"
            shutil.rmtree(fetched, ignore_errors=True)
            for name, changed in self._there.items():
                path = fetched / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(self._path(name), str(path))
                os.utime(path, ns=(changed, changed))
            (self._folder / _CHECKPOINTS).mkdir(exist_ok=True)
            for new in (fetched / _CHECKPOINTS).glob("*"):
                shutil.rmtree(self._folder / _CHECKPOINTS / new.name, ignore_errors=True)
                new.replace(self._folder / _CHECKPOINTS / new.name)
            for name in reversed(_FILES):  # the first says that the run is there
                if (fetched / name).exists():
                    (fetched / name).replace(self._folder / name)
            shutil.rmtree(fetched)

    def push(self, checkpoints: Checkpoints) -> None:
        """Begins to copy what has been saved, once the save that goes on is complete. What fails is
        in log.txt, and the next save tries again.
        """
        if self._fs is not None and (self._pushing is None or self._pushing.done()):
            self._pushing = self._worker.submit(self._copy, checkpoints)

    def finish(self, checkpoints: Checkpoints) -> None:
        """Copies what has been saved, and returns when that is done.

        Raises:
            RunFailed: the bucket does not take it.
        """
        for attempt in range(_TRIES if self._fs is not None else 0):
            if self._pushing is not None:
                self._pushing.result()
            self._pushing = self._worker.submit(self._copy, checkpoints)
            why = self._pushing.result()
            if not why:
                return
            if attempt + 1 == _TRIES:
                raise RunFailed(
                    f"{self._folder} is whole, but {self.url} refuses its copy, which is at"
                    f" {max(0, self._steps):,} steps: {why}; the same command copies it"
                )
            time.sleep(_PAUSE)

    def _copy(self, checkpoints: Checkpoints) -> str:
        """Copies a whole state of the run; returns why it could not, or nothing."""
        while checkpoints.saving:
            time.sleep(0.1)
        try:
            steps = checkpoints.steps()
            files = {
                str(path.relative_to(self._folder)): path.stat().st_mtime_ns
                for step in steps
                for path in (self._folder / _CHECKPOINTS / str(step)).rglob("*")
                if path.is_file()
            }
            for name, changed in files.items():
                if self._there.get(name) != changed:
                    self._fs.put_file(str(self._folder / name), self._path(name))
            for name in _FILES:
                path = self._folder / name
                if path.exists():
                    files[name] = path.stat().st_mtime_ns
                    self._fs.pipe_file(self._path(name), path.read_bytes())  # it may grow meanwhile
            newest = max(steps, default=0)
            manifest = {"steps": newest, "files": files, "row": last_row(self._folder)}
            self._fs.pipe_file(self._path(_MANIFEST), json.dumps(manifest).encode())
            old, self._there, self._steps = self._there, files, newest
            for name in old.keys() - files:
                self._fs.rm_file(self._path(name))
        except Exception as error:  # of the storage's library, whichever it is
            why = _reason(error)
            log.warning("%s: %s", self.url, why, extra={"folder": self._folder})
            return why
        return ""

    def seen(self) -> dict[str, Any]:
        """Returns what the bucket has of the run: `steps`, -1 where it has none, `files` and `row`.

        Raises:
            ConfigError: it refuses.
        """
        try:
            return dict(json.loads(self._fs.cat_file(self._path(_MANIFEST))))
        except FileNotFoundError:
            return {"steps": -1, "files": {}, "row": None}
        except Exception as error:
            raise self._refuses(error) from None

    def _refuses(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"mirror {self.url} refuses: {_reason(error)}; valid: a folder of a bucket that you may"
            " read and write"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _newest(folder: Path) -> int:
    """Returns the step of the newest checkpoint of a run directory, -1 if there is none."""
    steps = (folder / _CHECKPOINTS).glob("[0-9]*")
    return max((int(path.name) for path in steps if path.name.isdecimal()), default=-1)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
