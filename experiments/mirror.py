"""A copy of a run directory in a bucket, from which another machine goes on."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import guard
from experiments.config import RunFailed
from experiments.tracking import last_row
from jmql.settings import ConfigError

log = logging.getLogger("jmql")

# What is in the bucket: `steps` of the newest checkpoint, `files` with the times of their last
# change, and the last `row` of results. It is written last, so that what it names is there.
_MANIFEST = "mirror.json"
_STARTED = "started.json"  # which process trains there: the last that has begun
_CHECKPOINTS = "checkpoints"
_FILES = ("config.json", "tasks.npz", "metrics.jsonl", "log.txt", "failed.txt")  # beside them
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
        self._folder, whole = folder, folder.resolve()
        self.url = f"{url.rstrip('/')}/{whole.parent.name}/{whole.name}"
        self._there: dict[str, int] = {}  # `files` of the manifest
        self._steps = -1  # of the manifest
        self._token = secrets.token_hex(8)
        self._pushing: Future[str] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._fs: Any = None
        if not url:
            return
        import fsspec

        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it guesses aloud
        try:
            local = {} if "://" in url else {"auto_mkdir": True}
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **local)
        except ImportError as error:
            raise ConfigError(
                f"{url} cannot be read: {error}; valid: after .venv/bin/pip install"
                " 'etils[epath-gcs]'"
            ) from None
        except ValueError as error:
            raise ConfigError(f"mirror is {url}: {error}; valid: gs://BUCKET/FOLDER") from None

    def fetch(self) -> None:
        """Brings what the bucket has of the run, if that is further than what is here.

        Raises:
            ConfigError: the bucket refuses, or another process trains in the directory.
            RunFailed: it does not answer, or the disk refuses.
        """
        if self._fs is None:
            return
        who = {"token": self._token, "host": socket.gethostname(), "time": time.time()}
        with self._explained():
            self._fs.pipe_file(self._path(_STARTED), json.dumps(who).encode())
        manifest = self.seen()
        self._there, self._steps = manifest["files"], manifest["steps"]
        if not self._there or self._steps <= max(_steps(self._folder), default=-1):
            return
        with self._explained():
            self._folder.mkdir(parents=True, exist_ok=True)
            with guard.locked(self._folder):
                self._bring()

    def _bring(self) -> None:
        fetched = self._folder / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        there = self._fs.find(self._root, detail=True)
        for name, changed in self._there.items():
            path = fetched / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._path(name), str(path))
            size, found = there.get(self._path(name), {}).get("size"), path.stat().st_size
            if found != size:
                raise RuntimeError(f"{self._path(name)} came with {found} bytes of {size}")
            os.utime(path, ns=(changed, changed))
        for name in _FILES:
            if (fetched / name).exists():
                (fetched / name).replace(self._folder / name)
        # Last, and the newest of them last: a process that ends before fetches all again.
        (self._folder / _CHECKPOINTS).mkdir(exist_ok=True)
        for step in sorted(_steps(fetched)):
            place = self._folder / _CHECKPOINTS / str(step)
            shutil.rmtree(place, ignore_errors=True)
            (fetched / _CHECKPOINTS / str(step)).replace(place)
        shutil.rmtree(fetched)

    def push(self, saving: Callable[[], bool]) -> None:
        """Begins to copy what has been saved, once nothing is being saved any more. What fails is
        in log.txt, and the next save tries again.
        """
        if self._fs is not None and (self._pushing is None or self._pushing.done()):
            self._pushing = self._worker.submit(self._copy, saving)

    def finish(self) -> str:
        """Copies what has been saved; returns why the bucket does not take it, or nothing."""
        why = ""
        for attempt in range(_TRIES if self._fs is not None else 0):
            if attempt:
                time.sleep(_PAUSE)
            if self._pushing is not None:
                self._pushing.result()
            self._pushing = self._worker.submit(self._copy, lambda: False)
            why = self._pushing.result()
            if not why:
                return ""
        return why and (
            f"{self._folder} is whole, but {self.url} refuses its copy, which is at"
            f" {max(0, self._steps):,} steps: {why}; the same command copies it"
        )

    def seen(self) -> dict[str, Any]:
        """Returns what the bucket has of the run: `steps`, -1 where it has none, `files` and `row`.

        Raises:
            ConfigError: it refuses.
            RunFailed: it does not answer.
        """
        with self._explained():
            try:
                manifest = json.loads(self._fs.cat_file(self._path(_MANIFEST)))
            except FileNotFoundError:
                return {"steps": -1, "files": {}, "row": None}
            if not isinstance(manifest, dict) or not manifest.keys() >= {"steps", "files", "row"}:
                raise ValueError(f"{_MANIFEST} is not what a run has written")
            return manifest

    def _copy(self, saving: Callable[[], bool]) -> str:
        """Copies a whole state of the run; returns why it could not, or nothing."""
        while saving():
            time.sleep(0.1)
        try:
            return self._copy_now()
        except Exception as error:  # of the storage's library, whichever it is
            why = _reason(error)
            log.warning("%s: %s", self.url, why, extra={"folder": self._folder})
            return why

    def _copy_now(self) -> str:
        steps = sorted(_steps(self._folder))
        files: dict[str, int] = {}
        sent: dict[str, int] = {}  # bytes, by path
        for step in steps[::-1]:  # the newest first; an older one is kept where it is there
            new = _times(self._folder, (self._folder / _CHECKPOINTS / str(step)).rglob("*"))
            missing = [name for name, changed in new.items() if self._there.get(name) != changed]
            if missing and step != steps[-1]:
                continue
            for name in missing:
                self._put(name)
                sent[self._path(name)] = (self._folder / name).stat().st_size
            files |= new
        for name, changed in _times(self._folder, map(self._folder.joinpath, _FILES)).items():
            content = (self._folder / name).read_bytes()  # it may grow meanwhile
            self._fs.pipe_file(self._path(name), content)
            sent[self._path(name)] = len(content)
            files[name] = changed
        self._fs.invalidate_cache()
        there = self._fs.find(self._root, detail=True)
        for path, size in sent.items():  # a connection that breaks may leave half of one
            found = there.get(path, {}).get("size")
            if found != size:
                raise RuntimeError(f"{path} has {found} bytes of {size}")
        started = json.loads(self._fs.cat_file(self._path(_STARTED)))
        if started["token"] != self._token:
            raise RuntimeError(f"a process on {started['host']} trains this run since then")
        newest = max(steps, default=0)
        manifest = {"steps": newest, "files": files, "row": last_row(self._folder)}
        self._fs.pipe_file(self._path(_MANIFEST), json.dumps(manifest).encode())
        self._there, self._steps = files, newest
        self._fs.invalidate_cache()
        kept = {self._path(name) for name in (*files, _MANIFEST, _STARTED)}
        for path in set(self._fs.find(self._root)) - kept:
            self._fs.rm_file(path)
        return ""

    def _put(self, name: str) -> None:
        """Copies one file of a checkpoint. gcsfs parts a small file from the rest of its message by
        a bare newline: one that ends with a carriage return may come without it, every time. So
        such a file goes in a message of its own, which is what a file with `autocommit` off does.
        """
        path = self._folder / name
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1))
            if file.read() != b"\r" or "gs" not in self._fs.protocol:
                self._fs.put_file(str(path), self._path(name))
                return
            file.seek(0)
            with self._fs.open(self._path(name), "wb", autocommit=False) as there:
                shutil.copyfileobj(file, there)
        there.commit()

    @contextlib.contextmanager
    def _explained(self) -> Any:
        """Makes one line of whatever the storage's library raises."""
        try:
            yield
        except (ConfigError, RunFailed):
            raise
        except Exception as error:
            if _refuses(error):
                raise ConfigError(
                    f"mirror {self.url} refuses: {_reason(error)}; valid: a folder of a bucket that"
                    " you may read and write"
                ) from None
            raise RunFailed(f"mirror {self.url} does not answer: {_reason(error)}") from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder that are complete."""
    names = (path.name for path in (folder / _CHECKPOINTS).glob("*"))
    return [int(name) for name in names if name.isdecimal()]


def _times(folder: Path, paths: Iterable[Path]) -> dict[str, int]:
    """Returns when the files among some paths below a folder were changed, by their names there."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths if path.is_file()
    }


def _refuses(error: Exception) -> bool:
    """Returns whether an error of the storage's library is an answer, and not the network's."""
    usage = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError)
    denied = str(getattr(error, "code", "")) in ("401", "403") or str(error).startswith("Forbidden")
    return isinstance(error, usage) or denied


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
