"""Collectives of a compiled program, counted in its HLO text: how many run in one step, and over how many bytes.

What the text hides, and how it is counted here:
  * A loop's body is printed once.  Its length is the compiler's `known_trip_count` or else the constant that the
    loop's condition compares with (`lax.scan` counts from 0 by 1); loops whose length cannot be read count once, and
    are reported.
  * `x-start` and `x-done` are one collective; so are the `async-start` with a collective in the computation it calls
    and its `async-done`.
  * XLA's TPU compiler writes a reduce-scatter as a fusion named `all-reduce-scatter` around an all-reduce, and an
    asynchronous collective as the same instruction in three fusions: the one that starts it, one that computes
    meanwhile (`async_collective_fusion`) and the one that ends it.
  * An all-gather may be written as an all-reduce of arrays that are zero but for each device's own share (libtpu does
    so for small weights): it is counted as what it is written as.
Bytes are of the whole array on each device: what a gather makes, what a reduce-scatter or all-reduce takes in.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16} | {f"{sign}{n}": n for sign in "suf" for n in (8, 16, 32, 64)}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)\]}])([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Who talks to whom: axes of a mesh (whose devices may be in another order), the first of the groups themselves, or
# groups x members of a numbering.
_GROUPS = re.compile(
    r"replica_groups=(?:mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}|\{\{([\d,]+)\}|\[\d+,(\d+)\]<=)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Instruction(NamedTuple):
    name: str
    opcode: str
    result: str  # the type, as text
    rest: str  # operands, without the opening bracket, and attributes


def array_bytes(types: str) -> list[int]:
    """Sizes of the arrays in a type's text; layouts are no arrays, for they stand in braces."""
    return [
        math.prod(int(n) for n in dims.split(",") if n) * _BITS.get(dtype, 8) // 8
        for dtype, dims in _ARRAY.findall(types)
    ]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for text_line in text.splitlines():
        head = _HEAD.match(text_line)
        if head and " = " not in text_line.split("(", 1)[0]:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif lines is not None and (match := _INSTRUCTION.match(text_line)):
            name, body = match.groups()
            # The type ends where the opcode begins: a word before a bracket, outside the type's own brackets.
            depth = end = 0
            if body.startswith("("):
                for end, char in enumerate(body):  # noqa: B007
                    depth += (char == "(") - (char == ")")
                    if depth == 0:
                        break
            opcode = _OPCODE.search(body, body.find(" ", end))
            if opcode:
                lines.append(Instruction(name, opcode[1], body[: opcode.start(1)], body[opcode.end() :]))
    return computations, entry


def trips_of(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = dict(CALLED.findall(loop.rest)).get("condition", "")
    limits = {
        int(line.rest.partition(")")[0])
        for line in computations.get(condition, [])
        if line.opcode == "constant" and line.result.startswith("s32[]")
    }
    return limits.pop() if len(limits) == 1 else None


def _size(line: Instruction, sizes: dict[str, int]) -> int:
    """Bytes of the whole array of one collective: the larger of what goes in and what comes out."""
    operands = re.findall(r"%([\w.\-]+)", line.rest[: line.rest.find(")")])
    taken = sum(sizes.get(o, 0) for o in operands)
    made = array_bytes(line.result)
    if line.opcode.endswith("-start") and len(made) > len(operands):
        # A start's type repeats its operands before its results, and may end with scalars of its own.
        made = made[len(operands) : 2 * len(operands)]
    return max(taken, sum(made))


def _group(line: Instruction) -> str:
    """How many devices take part in each run of a collective, as text; "all" where it does not say."""
    match = _GROUPS.search(line.rest)
    if match is None:
        return "all"
    mesh, axes, members, number = match.groups()
    if mesh is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
        return str(math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes)))
    return number or str(members.count(",") + 1)


def count(text: str) -> dict[str, Any]:
    """{kind: {"static", "per_step", "bytes_per_step", "bytes_by_group"}} of the collectives in an optimized module.

    static counts instructions, per_step executions; bytes are per device and step, by_group those of each number of
    devices that take part.  "loops_of_unknown_length" counts the loops that hold collectives and were taken to run
    once.
    """
    computations, entry = parse(text)
    found: dict[str, dict[str, Any]] = {}
    unknown = 0

    def visit(name: str, times: int, scattered: bool) -> bool:
        """Counts `times` executions of computation `name`; whether it holds any collective.

        scattered: its all-reduces are reduce-scatters, of which each device keeps a part.  Of a conditional every
        branch is counted.
        """
        nonlocal unknown
        lines = computations.get(name, [])
        if any('"AsyncCollectiveDone"' in line.rest for line in lines) or name.startswith("async_collective_fusion"):
            return False
        sizes, held = {}, False
        for line in lines:
            sizes[line.name] = sum(array_bytes(line.result))
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                held = True
                kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
                row = found.setdefault(kind, {"static": 0, "per_step": 0, "bytes_per_step": 0, "bytes_by_group": {}})
                moved, group = times * _size(line, sizes), _group(line)
                row["static"] += 1
                row["per_step"] += times
                row["bytes_per_step"] += moved
                row["bytes_by_group"][group] = row["bytes_by_group"].get(group, 0) + moved
            elif line.opcode == "while":
                trips = trips_of(line, computations)
                body = dict(CALLED.findall(line.rest)).get("body", "")
                if visit(body, times * (1 if trips is None else trips), False):
                    held, unknown = True, unknown + (trips is None)
            elif line.opcode in ("fusion", "call", "async-start", "conditional"):
                called = [other for _, other in CALLED.findall(line.rest)]
                called += re.findall(r"%([\w.\-]+)", "".join(BRANCHES.findall(line.rest)))
                for other in called:
                    scatters = line.name.startswith("all-reduce-scatter") or other.startswith("all-reduce-scatter")
                    held |= visit(other, times, scatters)
        return held

    visit(entry, 1, False)
    return {kind: found[kind] for kind in KINDS if kind in found} | {"loops_of_unknown_length": unknown}
