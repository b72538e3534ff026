"""What a compiled program sends between devices: read from its HLO, by axis of the mesh.

A collective in the body of a loop counts as often as the loop turns: layers are scanned, so that most of them are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: of `KINDS`.
        axis: of the mesh that its groups go along, several joined by `+`; `other` for groups that follow no axes.
        size: devices in a group.
        bytes: of its result on one device; of a reduce-scatter, of its operand.
        times: how often a step runs it.
        dtype: of its first array, in XLA's words (`bf16`).
        product: whether its numbers are of a matrix product: its sums, or operands.
    """

    kind: str
    axis: str
    size: int
    bytes: float
    times: float
    dtype: str
    product: bool

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, in rings.

        `(n - 1) / n` of the result where devices gather, scatter or exchange, twice that where they sum.
        """
        if self.kind == "collective-permute":
            return self.bytes * self.times
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * self.times * (self.size - 1) / self.size


def collectives(
    hlo: str, axes: Mapping[str, int], *, turns: float = 1.0
) -> list[Collective]:
    """The collectives of a program, those between devices that are one alone left out.

    An all-reduce of which nothing is read but a slice is counted as the reduce-scatter that compilers for
    accelerators make of it.

    Args:
        hlo: the compiled program, `compiled.as_text()`.
        axes: the mesh, sizes by name, as its devices are numbered: the last name fastest.
        turns: of loops whose number of turns the program finds out as it runs.
    """
    computations = dict(_computations(hlo))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    times = _times({name: lines for name, (_, lines) in computations.items()}, entry, turns)
    found = []
    for name, (_, lines) in computations.items():
        if times.get(name):
            sliced = _sliced(lines)
            found += [
                c for line in lines for c in _of_line(line, axes, times[name], sliced) if c.size > 1
            ]
    return found


def sent_by_axis(found: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in a step over each axis."""
    total: dict[str, float] = {}
    for c in found:
        total[c.axis] = total.get(c.axis, 0.0) + c.sent
    return dict(sorted(total.items()))


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*?)\), (.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


def _computations(hlo: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    lines: list[str] = []
    name, is_entry = "", False
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name, is_entry, lines = head[2], bool(head[1]), []
        elif line.startswith("}") and name:
            yield name, (is_entry, lines)
            name = ""
        elif name:
            lines.append(line)


def _times(
    computations: Mapping[str, list[str]], entry: str, turns: float
) -> dict[str, float]:
    """How often a step runs each computation."""
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        for line in computations.get(name, ()):
            if body := _BODY.search(line):
                known = _TRIPS.search(line)
                visit(body[1], count * (float(known[1]) if known else turns))
            for called in _CALLED.findall(line):
                visit(called, count)
            if branches := _BRANCHES.search(line):
                for called in branches[1].replace("%", "").split(", "):
                    visit(called, count)

    visit(entry, 1.0)
    return times


def _sliced(lines: list[str]) -> set[str]:
    """Names of the values of which nothing is read but dynamic slices, in fusions or alone."""
    users: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(" = ")
        for operand in set(_OPERAND.findall(rest.partition(", metadata=")[0])):
            users.setdefault(operand, []).append(f"{name} {rest[:200].partition('(')[0]}")
    return {name for name, by in users.items() if all("dynamic-slice" in user for user in by)}


def _of_line(
    line: str, axes: Mapping[str, int], times: float, sliced: set[str]
) -> Iterator[Collective]:
    if not (match := _LINE.match(line)):
        return
    name, shapes, kind, start, _, attributes = match.groups()
    arrays = [_num_bytes(*array) for array in _ARRAY.findall(shapes)]
    if start and kind != "all-reduce":  # operands and results
        arrays = arrays[len(arrays) // 2 :]
    devices = math.prod(axes.values())
    groups = _groups(attributes, devices)
    size = len(groups[0])
    scale = size if kind == "reduce-scatter" else 1
    if kind == "all-reduce" and name in sliced:  # its result is as large as a reduce-scatter's operand
        kind = "reduce-scatter"
    product = bool(re.search(r'op_name="[^"]*dot_general"', attributes))
    axis = _axis(groups, axes)
    dtype = _ARRAY.findall(shapes)[0][0]
    yield Collective(kind, axis, size, scale * float(sum(arrays)), times, dtype, product)


def _num_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of devices, one a row, in the three ways in which programs write them."""
    if found := _PAIRS.search(attributes):
        pairs = [tuple(map(int, re.findall(r"\d+", pair))) for pair in found[1].split("},")]
        moved = [pair for pair in pairs if pair[0] != pair[1]]
        return np.array(moved or [(0,)])
    if found := _LISTED.search(attributes):
        rows = [list(map(int, re.findall(r"\d+", row))) for row in found[1].split("},")]
        return np.array(rows)
    if found := _IOTA.search(attributes):
        return _iota(found[1])
    if found := _MESH.search(attributes):
        return _of_mesh(*found.groups(), devices)
    return np.arange(devices)[None]  # replica_groups={}: all of them


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: the numbers from 0, reshaped, transposed and reshaped again."""
    shape, source, *order = (tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"[\[(][\d,]+[\])]", text))
    numbers = np.arange(math.prod(source)).reshape(source)
    return (numbers.transpose(order[0]) if order else numbers).reshape(shape)


def _of_mesh(sizes: str, ids: str | None, along: str, devices: int) -> np.ndarray:
    """`mesh['a'=4,'b'=2] {'a'}`: groups along some axes of a mesh, or parts of them, `'a':(2)2`."""
    order = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    numbers = np.arange(devices)
    if ids is not None:
        source, *turned = (tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"[\[(][\d,]+[\])]", ids))
        numbers = numbers.reshape(source)
        numbers = numbers.transpose(turned[0]) if turned else numbers
    split: list[int] = []
    chosen: list[int] = []
    parts = {n: (int(a or 1), int(b or 0)) for n, a, b in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, size in order.items():
        if name not in parts:
            split.append(size)
            continue
        before, own = parts[name]
        own = own or size
        chosen.append(len(split) + 1)
        split += [before, own, size // before // own]
    grid = numbers.reshape(split)
    rest = [axis for axis in range(grid.ndim) if axis not in chosen]
    count = math.prod(split[axis] for axis in chosen)
    return grid.transpose(*rest, *chosen).reshape(-1, count)


def _axis(groups: np.ndarray, axes: Mapping[str, int]) -> str:
    """The fewest axes whose lines are these groups, or hold them."""
    numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    places = {int(n): place for place, n in np.ndenumerate(numbers)}
    group = [places[int(device)] for row in groups for device in row]
    rows = np.array(group).reshape(*groups.shape, len(axes))
    varies = (rows != rows[:, :1]).any(axis=(0, 1))
    named = [name for name, moves in zip(axes, varies, strict=True) if moves]
    return "+".join(named) or "none"
