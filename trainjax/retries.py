"""Filesystems that fail for a moment: the same call again, after a pause that doubles."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.EREMOTEIO),
}
"""What a network's filesystem answers while its server is away; a full disk or a missing file is not it."""

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try."""

_log = logging.getLogger(__name__)


def is_transient(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, may be over in a moment.

    Libraries hand on the system's words, if not its number.
    """
    return any(
        getattr(cause, "errno", None) in TRANSIENT
        or any(os.strerror(number) in str(cause) for number in TRANSIENT)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retried(call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """`call(*args, **kwargs)`, once more after each of `PAUSES` while its errors are transient."""
    for pause in PAUSES:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not is_transient(error):
                raise
            _log.warning("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    return call(*args, **kwargs)
