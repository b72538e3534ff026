"""The mesh: all devices, laid out by what each axis is for."""

from __future__ import annotations

from typing import NamedTuple

import jax
import pytest

from trainjax.parallel import mesh
from trainjax.parallel.mesh import _by_slice

assert jax.device_count() == 4  # tests/conftest.py


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 4, 1)),
        ({"tensor": 2}, (1, 2, 2)),
        ({"data": -1, "fsdp": 2}, (2, 2, 1)),
        ({"data": 1, "fsdp": 1, "tensor": -1}, (1, 1, 4)),
        ({"data": 4, "fsdp": 1}, (4, 1, 1)),
    ],
)
def test_the_axis_left_open_takes_the_devices_that_are_left(sizes, expected):
    found = mesh(**sizes)
    assert dict(found.shape) == dict(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert set(found.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"sequence": 2}, {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 1}),
        ({"fsdp": 1, "expert": -1}, {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}),
        ({"slices": 2, "tensor": 2}, {"slice": 2, "data": 1, "fsdp": 1, "tensor": 2}),
    ],
)
def test_further_axes_are_there_where_they_are_asked_for(sizes, expected):
    found = mesh(**sizes)
    assert list(found.shape.items()) == list(expected.items())  # in this order


class Device(NamedTuple):
    slice_index: int
    process_index: int
    id: int
    platform: str = "tpu"


def test_the_devices_of_a_slice_are_together(monkeypatch):
    devices = [Device(number % 2, 0, number) for number in range(8)]
    assert [d.id for part in _by_slice(devices, 2) for d in part] == [0, 2, 4, 6, 1, 3, 5, 7]
    nodes = [Device(number // 2, 3 - number // 2, number, "gpu") for number in range(8)]
    assert [d.id for part in _by_slice(nodes, 4) for d in part] == [6, 7, 4, 5, 2, 3, 0, 1]


def test_slices_that_are_not_the_devices_own_are_refused():
    devices = [Device(number % 2, 0, number) for number in range(8)]
    with pytest.raises(ValueError, match="slices=4, but the devices are of 2 slices; leave it out"):
        _by_slice(devices, 4)
    with pytest.raises(ValueError, match="the 2 slices have unequal numbers of devices"):
        _by_slice([*devices[:7], Device(0, 0, 7)], 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=-1 x tensor=1 does not multiply to the 4 devices"),
        ({"data": 2, "fsdp": 1}, "data=2 x fsdp=1 x tensor=1 does not multiply to the 4 devices"),
        ({"fsdp": 8}, "does not multiply to the 4 devices"),
        ({"data": -1}, "data=-1 x fsdp=-1 x tensor=1: sizes are positive, and one at most is -1"),
        ({"tensor": 0}, "tensor=0: sizes are positive"),
        ({"data": -2}, "data=-2 .* sizes are positive"),
        ({"slices": 3}, "slice=3 does not multiply to the 4 devices"),
        ({"slices": -1}, "slice=-1: sizes are positive"),
        ({"sequence": 3}, "fsdp=-1 x tensor=1 x sequence=3 does not multiply to the 4 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh(**sizes)


@pytest.mark.parametrize(("threads", "warns"), [("2", True), ("7", True), ("8", False)])
def test_devices_that_share_too_few_threads_are_told_of(threads, warns, monkeypatch, caplog):
    monkeypatch.setenv("NPROC", threads)
    mesh()
    assert ("4 CPU devices" in caplog.text and "set NPROC=16" in caplog.text) == warns
