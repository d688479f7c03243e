"""Signals: SIGTERM and Ctrl-C end a run after the cycle in flight, a second Ctrl-C at once."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from experiments.terminal import errors

SAVED = 33  # exit code: stopped by a signal, and saved; resuming goes on exactly there


class Stop:
    """Remembers the first SIGTERM or SIGINT, while it is entered.

    Before `ready` is set there is nothing to save, and a signal ends the process at once.

    Args:
        resume: the command that goes on, for the user.
    """

    def __init__(self, resume: str):
        self.signal: str | None = None  # the signal's name, once there was one
        self.ready = False
        self._resume = resume
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, call: Callable[..., Any], *args: Any) -> Any:
        """Returns what a call that blocks for long returns.

        It runs in a thread, for only a main thread that is not in the call can answer signals.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(call, *args).result()

    def _handle(self, number: int, _: Any) -> None:
        if not self.ready:
            errors.print(f"jmql: stopped, nothing is lost; go on with: {self._resume}")
            os._exit(SAVED)
        if self.signal and number == signal.SIGINT:
            errors.print(f"jmql: gave up the cycle in flight; go on with: {self._resume}")
            os._exit(1)
        self.signal = signal.Signals(number).name
        errors.print(f"jmql: {self.signal}: saving after the cycle in flight (Ctrl-C: stop now)")
