"""Devices by name, the links of a mesh's axes, and the roofline over both."""

import dataclasses

import pytest

from trainjax.parallel.devices import DEVICES, axis_bandwidth, device_of_kind, find_device
from trainjax.parallel.roofline import Roofline, roofline


def sizes(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [
        ("h100", "h100", None),
        ("H200", "h200", None),
        ("v5p-256", "v5p", 128),
        ("v5e-256", "v5e", 256),
    ],
)
def test_a_slice_is_called_by_its_cores(kind, name, count):
    device, found = find_device(kind)
    assert (device.name, found) == (name, count)


@pytest.mark.parametrize("kind", ["h1000", "v7x", "v5p-big"])
def test_an_unknown_device_is_answered_with_those_there_are(kind):
    with pytest.raises(
        ValueError, match=f"no device '{kind}': v4, v5e, v5p, v6e, a100, h100, h200, b200"
    ):
        find_device(kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_a_device_is_known_by_what_jax_calls_it(kind, name):
    assert device_of_kind(kind) is DEVICES[name]


def test_an_axis_within_a_node_has_its_links_and_one_across_the_cards_of_its_members():
    h100 = DEVICES["h100"]
    assert axis_bandwidth(h100, sizes(fsdp=8), "fsdp") == h100.within
    assert axis_bandwidth(h100, sizes(fsdp=16), "fsdp") == 8 * h100.between
    tensor = sizes(fsdp=16, tensor=4)
    assert axis_bandwidth(h100, tensor, "tensor") == h100.within
    assert axis_bandwidth(h100, tensor, "fsdp") == 2 * h100.between
    assert axis_bandwidth(h100, sizes(data=4, fsdp=8), "data") == h100.between


def test_axes_share_the_links_of_a_torus():
    v5p = DEVICES["v5p"]
    assert axis_bandwidth(v5p, sizes(fsdp=128), "fsdp") == v5p.within
    both = sizes(fsdp=32, tensor=4)
    assert axis_bandwidth(v5p, both, "fsdp") == v5p.within / 2
    assert axis_bandwidth(v5p, both, "fsdp+tensor") == v5p.within


def test_a_step_is_its_longest_part_and_what_is_waited_for():
    h100 = DEVICES["h100"]
    mesh = sizes(fsdp=4, tensor=2)
    sent = {"fsdp": 0.2 * h100.within, "tensor": 0.1 * h100.within}
    busy = roofline(h100, mesh, flops=0.35 * h100.flops, traffic=0.0, sent=sent, efficiency=0.7)
    assert busy == Roofline(compute=0.5, memory=0.0, overlapped=0.2, exposed=0.1)
    assert busy.step == pytest.approx(0.6)
    assert busy.bound == "compute"
    idle = roofline(h100, mesh, flops=0.0, traffic=h100.bandwidth, sent=sent)
    assert (idle.step, idle.bound) == (pytest.approx(1.1), "memory")
    talking = dataclasses.replace(busy, overlapped=2.0)
    assert (talking.step, talking.bound) == (pytest.approx(2.1), "communication")
