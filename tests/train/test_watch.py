"""A step that takes too long is reported once, with the place where it is."""

from __future__ import annotations

import threading

from trainjax.train.watch import Watch


def a_place_that_waits(watch, told, step):
    watch.begin(step)
    assert told.wait(20.0)


def test_a_stuck_step_is_reported_with_the_stack(caplog, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(
        "trainjax.train.watch._log.warning", lambda *args: (said.append(args), told.set())
    )
    said = []
    with Watch(0.05) as watch:
        a_place_that_waits(watch, told, 7)
    text = said[0][0] % said[0][1:]
    assert text.startswith("step 7 has not ended after 0 s")
    assert "a_place_that_waits" in text
    assert len(said) == 1


def test_steps_that_end_in_time_are_not():
    threads = threading.active_count()
    with Watch(0.0):
        assert threading.active_count() == threads  # never: not even a thread
