"""A word when a step takes too long, with the place where the program is."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from types import TracebackType

_log = logging.getLogger(__name__)


class Watch:
    """Logs the stack of the thread that made it when nothing has been done for so many seconds.

    A step waits for ever where another process has gone astray, a filesystem hangs, or a loader has nothing
    to give: the stack tells which. It is said once for each step; the program goes on.

    Args:
        seconds: after which a step counts as stuck; 0 for never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._thread = seconds, threading.get_ident()
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        if self._seconds > 0:
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        stack: TracebackType | None,
    ) -> None:
        self._ended.set()

    def begin(self, step: int) -> None:
        """A step begins; the one before it has ended."""
        self._step, self._since, self._told = step, time.monotonic(), False

    def _look(self) -> None:
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            taken = time.monotonic() - self._since
            if taken < self._seconds or self._told:
                continue
            self._told = True
            frame = sys._current_frames().get(self._thread)
            stack = "" if frame is None else "".join(traceback.format_stack(frame))
            _log.warning(
                "step %d has not ended after %.0f s (the first also compiles); it is here:\n%s",
                *(self._step, taken, stack),
            )
