"""Signals that ask a run to stop: heard between two updates, so that it stops whole."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

from diffrl import processes

_HEARD = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While it is entered, the first SIGTERM (preemption) or SIGINT (Ctrl-C) only sets `asked`.

    It says so. A second one stops at once, as ever.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.heard is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others hear none
            self._before = {number: signal.signal(number, self._hear) for number in _HEARD}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reraise(self) -> None:
        """Raise KeyboardInterrupt if it was Ctrl-C that came; after SIGTERM, nothing more was asked."""
        if self.heard == signal.SIGINT:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        for known, handler in self._before.items():
            signal.signal(known, handler)
        if processes.is_first():
            line = (
                f"\n{signal.Signals(number).name}: the run ends after the update at hand; a second one "
                "ends it at once, and it goes on from its last checkpoint.\n"
            )
            # past Python's streams, in the midst of whose work it may come; the terminal may be gone
            with suppress(OSError):
                os.write(2, line.encode())
