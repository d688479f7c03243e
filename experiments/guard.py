"""What keeps a run directory from harm: a lock, a log of what went wrong, a look before writing."""

import contextlib
import fcntl
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.config import RunFailed
from jmql.settings import ConfigError


def refuse_unwritable(folder: Path) -> None:
    """Raises RunFailed if no file can be made in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunFailed(f"{folder} cannot be written to: {error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run directory, until this one ends.

    Raises:
        ConfigError: another process is at it.
        RunFailed: the file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another process is training in {folder}; valid: once it ends") from None
    except OSError as error:
        os.close(handle)
        raise RunFailed(f"{folder} cannot be locked: {error}") from None
    try:
        yield
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Returns whether another process trains in a folder, which need not be there."""
    try:
        with locked(folder):
            return False
    except ConfigError:
        return True
    except (OSError, RunFailed):  # whoever trains there will say so
        return False


class _LogFile(logging.FileHandler):
    """A log that a disk may refuse; what should be in it is then in the way of nothing."""

    def __init__(self, folder: Path):
        self._path = folder / "log.txt"
        super().__init__(self._path, delay=True, encoding="utf-8")
        # What concerns another run of the process is for its own log.
        self.addFilter(lambda record: getattr(record, "folder", folder) == folder)
        self.where = ""  # the traceback is, or why it is nowhere

    def emit(self, record: logging.LogRecord) -> None:
        self.where = f"traceback in {self._path}"
        try:
            super().emit(record)
        except OSError as error:  # it cannot be opened
            self.where = f"the traceback is lost ({error})"

    def handleError(self, _: logging.LogRecord) -> None:  # it cannot be written to
        self.where = f"the traceback is lost ({sys.exc_info()[1]})"


@contextlib.contextmanager
def logged(*folders: Path) -> Iterator[None]:
    """Sends warnings, and the traceback of an error, to log.txt of the folders of a process.

    Raises:
        RunFailed: the error in one line.
    """
    handlers = [_LogFile(folder) for folder in folders]
    for handler in handlers:
        logging.getLogger().addHandler(handler)
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        logging.exception("the run failed")
        summary = str(error)
        if not isinstance(error, RunFailed):
            summary = f"{type(error).__name__}: {summary.strip().partition(chr(10))[0]}"
        raise RunFailed(f"{summary}; {handlers[0].where}") from error
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            with contextlib.suppress(OSError):  # the disk is full
                handler.close()
