"""What a compiled program sends between devices: read from its HLO, by axis of the mesh.

A collective in the body of a loop counts as often as the loop turns: layers are scanned.
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
        axis: of the mesh that its groups go along, several joined by `+`.
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


def collectives(hlo: str, axes: Mapping[str, int], *, turns: float = 1.0) -> list[Collective]:
    """The collectives of a program, those between devices that are one alone left out.

    An all-reduce of which nothing is read but a slice is counted as the reduce-scatter that compilers for
    accelerators make of it.

    Args:
        hlo: the compiled program, `compiled.as_text()`.
        axes: the mesh, sizes by name, as its devices are numbered: the last name fastest.
        turns: of loops whose number of turns the program finds out as it runs.
    """
    computations, entry = _computations(hlo)
    times = _times(computations, entry, turns)
    program = _Program(computations)
    return [
        collective
        for name, lines in computations.items()
        for line in (lines if times.get(name) else ())
        for collective in _of_line(line, name, axes, times[name], program)
        if collective.size > 1
    ]


def sent_by_axis(found: list[Collective]) -> dict[str, float]:
    """Bytes that one device sends in a step over each axis."""
    total: dict[str, float] = {}
    for c in found:
        total[c.axis] = total.get(c.axis, 0.0) + c.sent
    return dict(sorted(total.items()))


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:to_apply|calls|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\((.*?)\), (.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that the program begins with."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            found[name].append(line)
    return found, entry


def _times(computations: Mapping[str, list[str]], entry: str, turns: float) -> dict[str, float]:
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


class _Program:
    """Which operations read which values, through fusions."""

    def __init__(self, computations: Mapping[str, list[str]]):
        self.lines = {
            name: {line.partition(" = ")[0].split()[-1].lstrip("%"): line for line in lines}
            for name, lines in computations.items()
        }
        self.users = {name: _users(lines) for name, lines in self.lines.items()}

    def is_of_product(self, computation: str, name: str) -> bool:
        """Whether a value was made by a matrix product, in the words of the program that was traced."""
        line = self.lines[computation].get(name, "")
        return bool(re.search(r'op_name="[^"]*dot_general', line)) or name.startswith("dot")

    def is_sliced(self, computation: str, name: str) -> bool:
        """Whether nothing is read of a value but a dynamic slice."""
        users = self.users[computation].get(name, [])
        return bool(users) and all(self._slices(computation, user, name) for user in users)

    def _slices(self, computation: str, user: str, name: str) -> bool:
        line = self.lines[computation][user].partition(" = ")[2]
        operation = _OPERATION.search(line)
        if operation is None:
            return False
        operands = _OPERAND.findall(line[operation.end() :].partition(")")[0])
        if operation[1] == "dynamic-slice":
            return operands[0] == name
        if operation[1] == "fusion" and (called := _CALLED.search(line)):
            parameters = {
                int(found[1]): inner
                for inner, text in self.lines[called[1]].items()
                if (found := re.search(r" parameter\((\d+)\)", text))
            }
            places = [place for place, operand in enumerate(operands) if operand == name]
            return all(self.is_sliced(called[1], parameters[place]) for place in places)
        return operation[1] in _SAME and self.is_sliced(computation, user)


_OPERATION = re.compile(r" ([a-z][\w\-]*)\(")
_SAME = ("bitcast", "convert", "copy", "reshape", "transpose")


def _users(lines: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, line in lines.items():
        text = line.partition(" = ")[2]
        operation = _OPERATION.search(text)
        if operation is not None:
            for operand in set(_OPERAND.findall(text[operation.end() :].partition(")")[0])):
                found.setdefault(operand, []).append(name)
    return found


def _of_line(
    line: str, computation: str, axes: Mapping[str, int], times: float, program: _Program
) -> Iterator[Collective]:
    """The collective of a line; of one that was combined of several, each."""
    if not (match := _LINE.match(line)):
        return
    name, shapes, kind, start, operands, attributes = match.groups()
    arrays = _ARRAY.findall(shapes)
    if start and kind != "all-reduce":  # operands and results
        arrays = arrays[len(arrays) // 2 :]
    groups = _groups(attributes, math.prod(axes.values()))
    size, axis = len(groups[0]), _axis(groups, axes)
    own = "dot_general" in attributes.partition("op_name=")[2]
    if kind == "all-to-all":  # of a tuple, an array for each device of the group
        total = float(sum(_num_bytes(*array) for array in arrays))
        yield Collective(kind, axis, size, total, times, arrays[0][0], own)
        return
    sources, values = _OPERAND.findall(operands), [name]
    if shapes.startswith("("):
        values = [
            next(
                (
                    v
                    for v, text in program.lines[computation].items()
                    if re.search(rf"get-tuple-element\(.*%{re.escape(name)}\), index={i}\b", text)
                ),
                "",
            )
            for i in range(len(arrays))
        ]
    for array, source, value in zip(arrays, sources, values, strict=False):
        product = (own and len(arrays) == 1) or program.is_of_product(computation, source)
        kind_of, count = kind, float(_num_bytes(*array))
        if kind == "reduce-scatter":
            count *= size
        elif kind == "all-reduce" and program.is_sliced(computation, value):
            kind_of = "reduce-scatter"  # its operand is as large as the sum that it is cut from
        yield Collective(kind_of, axis, size, count, times, array[0], product)


def _num_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}")
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
        return _of_mesh(found[1], found[2], found[3], devices)
    return np.arange(devices)[None]  # replica_groups={}: all of them


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: the numbers from 0, reshaped, transposed and reshaped again."""
    shape, source, *order = (
        tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"[\[(][\d,]+[\])]", text)
    )
    numbers = np.arange(math.prod(source)).reshape(source)
    return (numbers.transpose(order[0]) if order else numbers).reshape(shape)


def _of_mesh(sizes: str, ids: str | None, along: str, devices: int) -> np.ndarray:
    """`mesh['a'=4,'b'=2] {'a'}`: groups along some axes of a mesh, or parts of them, `'a':(2)2`."""
    order = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    numbers = np.arange(devices)
    if ids is not None:
        source, *turned = (
            tuple(map(int, re.findall(r"\d+", part)))
            for part in re.findall(r"[\[(][\d,]+[\])]", ids)
        )
        numbers = numbers.reshape(source)
        numbers = numbers.transpose(turned[0]) if turned else numbers
    split: list[int] = []
    chosen: list[int] = []
    parts = {
        n: (int(a or 1), int(b or 0))
        for n, a, b in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    }
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
    rows: np.ndarray = np.array(group).reshape(*groups.shape, len(axes))
    varies = (rows != rows[:, :1]).any(axis=(0, 1))
    named = [name for name, moves in zip(axes, varies, strict=True) if moves]
    return "+".join(named) or "none"
