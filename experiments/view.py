"""The terminal is a view of a run: losing it must not lose the run."""

import contextlib
import logging
import os
from typing import Any, TextIO


class View:
    """Standard output or error, whose loss is no error: a reader may go away, a terminal close.

    Args:
        stream: of the process. Once it is lost, its descriptor leads nowhere.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes, or loses the stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            return self._lost(error)

    def flush(self) -> None:
        """Flushes, or loses the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> int:
        logging.getLogger("jmql").warning("%s is gone: %s", self._stream.name, error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            self._stream.flush()  # what was not written before
        return 0
