"""Signals: SIGTERM, SIGHUP or Ctrl-C end a run after a cycle, a second Ctrl-C at once."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

Result = TypeVar("Result")

SAVED = 33  # exit code: stopped by a signal, and saved; resuming goes on exactly there


class Stop:
    """Remembers the first SIGTERM, SIGHUP or SIGINT, while it is entered.

    Before `ready` is set there is nothing to save, and after `saved` is set nothing more: a signal
    then ends the process at once. SIGHUP that the process was started to ignore (nohup) stays so.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # the signal's name, once there was one
        self.ready = False
        self.saved = False  # set once there is nothing more to save
        self.again = "the same command"  # what goes on, for the user
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, call: Callable[..., Result], *args: Any) -> Result:
        """Returns what a call that blocks for long returns.

        It runs in a thread, for only a main thread that is not in the call can answer signals.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(call, *args).result()

    def _handle(self, number: int, _: Any) -> None:
        if self.saved or not self.ready:
            _say(f"stopped, nothing is lost; go on with: {self.again}")
            os._exit(SAVED)
        if self.signal and number == signal.SIGINT:
            _say(f"gave up the cycle in flight; go on with: {self.again}")
            os._exit(1)
        self.signal = signal.Signals(number).name
        _say(f"{self.signal}: saving after the cycle in flight (Ctrl-C: stop now)")


def _say(text: str) -> None:
    """Prints a line, also while a library's complaints are being kept from the terminal."""
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"jmql: {text}", file=sys.__stderr__, flush=True)
