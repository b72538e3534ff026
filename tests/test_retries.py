"""What is tried again, how often, and what is not."""

from __future__ import annotations

import errno

import pytest

from trainjax import retries


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(retries.time, "sleep", found.append)
    return found


def failing(times, error):
    left = [error] * times

    def call(answer):
        if left:
            raise left.pop()
        return answer

    return call


def test_a_moments_failure_is_passed_over(pauses, caplog):
    call = failing(3, OSError(errno.EIO, "Input/output error", "/mnt/x"))
    assert retries.retried(call, "there") == "there"
    assert pauses == [1.0, 2.0, 4.0]
    assert "/mnt/x" in caplog.text


def test_it_ends(pauses):
    with pytest.raises(OSError, match="Stale"):
        retries.retried(failing(99, OSError(errno.ESTALE, "Stale file handle")), 0)
    assert pauses == list(retries.PAUSES)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EACCES])
def test_what_no_pause_mends_is_raised_at_once(number, pauses):
    with pytest.raises(OSError, match=f"Errno {number}"):
        retries.retried(failing(1, OSError(number, "x")), 0)
    assert not pauses


def test_a_cause_is_known_through_other_errors():
    outer = ValueError("no safetensors file")
    outer.__cause__ = OSError(errno.EIO, "x")
    assert retries.is_transient(outer)
    assert retries.is_transient(RuntimeError("tensorstore: Input/output error [OS error 5]"))
    assert not retries.is_transient(ValueError("no such key"))
