"""What can be read from a compiled training step's text (`compiled.as_text()`): what it holds, moves, casts, starts.

    program = Program(compiled.as_text())
    squares(program, tokens=1920)          [] or the instructions that hold scores of all tokens with all tokens

Every check returns the instructions that it objects to, as text, so that an empty list is a pass and anything else says
where to look.  Arrays are told apart by their sizes, so the step has to be compiled with a length and a micro-batch
that no product of the model's dimensions equals: rows of 1920 tokens for TinyLlama's.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from tinyllama_jax.preflight import collectives

# Instructions that start nothing: names for what is there already, and the ends of what was started before.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
CONTROL = {"while", "call", "conditional"}  # what they call is counted, not they
# Instructions that give their operand's values as they are, some of them or in another order.
MOVES = {"bitcast", "copy", "reshape", "transpose", "slice", "dynamic-slice", "get-tuple-element", "opt-barrier"}
COPIES = {"copy", "copy-start", "transpose"}
HOST = ("infeed", "outfeed", "send", "recv")  # and with -start, -done
CALLBACK = re.compile(r"callback|host|python", re.IGNORECASE)
HOST_MEMORY = re.compile(r"\{[^{}]*S\(5\)[^{}]*\}")  # a layout in the host's memory

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")
_KIND = re.compile(r"\bkind=k(\w+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_AGAIN = re.compile(r"\.remat\d*(?=\.|$)")  # what XLA calls a copy of an instruction that runs once more
_PRODUCT = re.compile(r"gemm|dot|convolution")


class Place(NamedTuple):
    """A computation whose instructions run one after another: the entry, a loop's body, a branch."""

    loops: int  # how many lie around it
    times: int  # how often a step runs it; a loop of unknown length counts once


class Program:
    """A compiled module: `computations` by name, `places` that run, and `callers` of what is inside a fusion."""

    def __init__(self, text: str):
        self.header = text.lstrip().partition("\n")[0]
        self.computations, self.entry = collectives.parse(text)
        self.places: dict[str, Place] = {}
        self.callers: dict[str, tuple[str, collectives.Instruction]] = {}
        self._lines = {name: {line.name: line for line in lines} for name, lines in self.computations.items()}
        self._visit(self.entry, Place(0, 1))

    def _visit(self, name: str, place: Place) -> None:
        before = self.places.get(name)
        self.places[name] = Place(place.loops, place.times + (before.times if before else 0))
        for line in self.computations.get(name, []):
            called = called_by(line)
            if line.opcode == "while":
                # The condition is left out: where the length is known nothing asks it.
                trips = collectives.trips_of(line, self.computations) or 1
                body = dict(collectives.CALLED.findall(line.rest))["body"]
                self._visit(body, Place(place.loops + 1, place.times * trips))
            elif line.opcode in ("call", "conditional"):
                for other in called:
                    self._visit(other, place)
            elif line.opcode in ("fusion", "async-start"):
                self._enter(name, line, called)

    def _enter(self, name: str, line: collectives.Instruction, called: list[str]) -> None:
        for other in called:
            self.callers[other] = (name, line)
            for inner in self.computations.get(other, []):
                if inner.opcode == "fusion":
                    self._enter(other, inner, called_by(inner))

    def place_of(self, name: str) -> Place:
        """Where a computation runs, be it inside of a fusion."""
        while name not in self.places and name in self.callers:
            name = self.callers[name][0]
        return self.places.get(name, Place(0, 0))

    def instructions(self) -> Iterator[tuple[str, collectives.Instruction]]:
        """(computation, instruction) of the whole module, insides of fusions too."""
        for name, lines in self.computations.items():
            for line in lines:
                yield name, line

    def operand(self, name: str, line: collectives.Instruction, number: int = 0) -> collectives.Instruction | None:
        """The instruction whose value is the operand of that number."""
        names = operands(line)
        return self._lines[name].get(names[number]) if number < len(names) else None

    def source(self, name: str, line: collectives.Instruction) -> collectives.Instruction:
        """Where a value comes from, back through what only moves it and out of fusions: an instruction that computes
        it, or a parameter of the entry or of a loop's body."""
        while True:
            if line.opcode == "parameter" and name not in self.places and name in self.callers:
                number = int(line.rest.partition(")")[0])
                name, caller = self.callers[name]
                before = self.operand(name, caller, number)
            elif line.opcode in MOVES:
                before = self.operand(name, line)
            else:
                return line
            if before is None:
                return line
            line = before


def called_by(line: collectives.Instruction) -> list[str]:
    called = [other for _, other in collectives.CALLED.findall(line.rest)]
    return called + re.findall(r"%([\w.\-]+)", "".join(collectives.BRANCHES.findall(line.rest)))


def operands(line: collectives.Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", line.rest[: line.rest.find(")")])


def arrays(types: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a type's text."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(types)]


def said(name: str, line: collectives.Instruction) -> str:
    """An instruction as a reader finds it, cut short."""
    return f"{name}: {line.name} = {line.result.strip()[:120]} {line.opcode}({line.rest[:80]}"


def squares(program: Program, tokens: int) -> list[str]:
    """Arrays with two dimensions that are multiples of a row's tokens: a score for each pair of them, or a mask."""
    return [
        said(name, line)
        for name, line in program.instructions()
        if any(sum(n > 0 and n % tokens == 0 for n in dims) >= 2 for _, dims in arrays(line.result))
    ]


def logits(program: Program, vocab: int, weights: Collection[int]) -> dict[int, list[str]]:
    """tokens -> instructions whose result is a number of each word for so many tokens; arrays of as many values as a
    weight has are none.  Of any dtype."""
    found: dict[int, list[str]] = {}
    for name, line in program.instructions():
        for _, dims in arrays(line.result):
            if vocab in dims and len(dims) > 1 and math.prod(dims) not in weights:
                found.setdefault(math.prod(dims) // vocab, []).append(said(name, line))
    return found


def host_traffic(program: Program) -> list[str]:
    """What waits for the host in the middle of a step: feeds, transfers, callbacks, arrays in its memory."""
    return [
        said(name, line)
        for name, line in program.instructions()
        if line.opcode.removesuffix("-start").removesuffix("-done") in HOST
        or (line.opcode == "custom-call" and CALLBACK.search("".join(_TARGET.findall(line.rest))))
        or HOST_MEMORY.search(line.result)
    ]


def donated_bytes(program: Program) -> int:
    """Bytes of the entry's parameters in whose place results are written."""
    sizes = {
        int(line.rest.partition(")")[0]): sum(collectives.array_bytes(line.result))
        for line in program.computations[program.entry]
        if line.opcode == "parameter"
    }
    return sum(sizes[int(number)] for number in set(_ALIAS.findall(program.header)))


def copies(program: Program, sizes: Collection[int]) -> dict[str, list[str]]:
    """Instructions that do nothing but copy an array of one of these sizes (values, not bytes): in the entry, where the
    optimizer is, and in loops.  A fusion counts that copies or transposes and computes nothing."""
    found: dict[str, list[str]] = {"entry": [], "loops": []}
    for name, place in program.places.items():
        for line in program.computations.get(name, []):
            if _only_copies(program, line) and any(math.prod(dims) in sizes for _, dims in arrays(line.result)):
                found["loops" if place.loops else "entry"].append(said(name, line))
    return found


def _only_copies(program: Program, line: collectives.Instruction) -> bool:
    if line.opcode != "fusion":
        return line.opcode in COPIES
    inside = {inner.opcode for other in called_by(line) for inner in program.computations.get(other, [])} - FREE
    return bool(inside & COPIES) and inside <= COPIES | MOVES


def casts(program: Program, sizes: Collection[int]) -> dict[str, list[str]]:
    """Conversions to bfloat16 of a float32 array of one of these sizes that nothing has computed in the same place: a
    weight, from the entry's or a loop's parameters.  In the entry, once a step, and in loops."""
    found: dict[str, list[str]] = {"entry": [], "loops": []}
    for name, line in program.instructions():
        if line.opcode != "convert" or not line.result.startswith("bf16"):
            continue
        before = program.operand(name, line)
        if before is None or not before.result.startswith("f32") or math.prod(arrays(line.result)[0][1]) not in sizes:
            continue
        if program.source(name, before).opcode == "parameter" and (place := program.place_of(name)).times:
            found["loops" if place.loops else "entry"].append(said(name, line))
    return found


def unordered_scatters(program: Program) -> list[str]:
    """Scatters that combine what falls on one place in no fixed order: sums whose last bits differ from run to run."""
    found = []
    for name, line in program.instructions():
        if line.opcode == "select-and-scatter" or (line.opcode == "scatter" and "unique_indices=true" not in line.rest):
            combiner = [line for other in called_by(line) for line in program.computations.get(other, [])]
            if line.opcode != "scatter" or any(inner.opcode not in FREE for inner in combiner):
                found.append(said(name, line))
    return found


def kernels(program: Program) -> dict:
    """What a step starts: {"per_step", "by_kind", "places": {computation: {"loops", "times", "kernels"}}, "again"}.

    Fusions are told apart by kind: loop, input (reductions), custom (kernels of Triton's) and output; custom calls by
    target.  by_kind counts executions; copies of scalars are in, conditions of loops are not.  again: executions of
    what has been computed before in the same place, for XLA has no room to keep it, beside what the program itself
    rematerialises; `products` of them are matrix products.
    """
    places, total = {}, collections.Counter()
    again = {"kernels": 0, "products": 0}
    for name, place in program.places.items():
        lines = [
            line
            for line in program.computations.get(name, [])
            if line.opcode not in FREE | CONTROL and not line.opcode.endswith("-done")
        ]
        if lines:
            places[name] = {"loops": place.loops, "times": place.times, "kernels": len(lines)}
        for line in lines:
            total[kind(line)] += place.times
        products = [line for line in lines if _PRODUCT.search(f"{line.name} {kind(line)}")]
        again["kernels"] += place.times * _repeats(lines)
        again["products"] += place.times * _repeats(products)
    return {"per_step": sum(total.values()), "by_kind": dict(total.most_common()), "places": places, "again": again}


def _repeats(lines: list[collectives.Instruction]) -> int:
    return len(lines) - len({_AGAIN.sub("", line.name) for line in lines})


def kind(line: collectives.Instruction) -> str:
    if line.opcode == "fusion":
        return "fusion:" + "".join(_KIND.findall(line.rest)[:1]).lower()
    if line.opcode == "custom-call":
        return "custom-call:" + "".join(_TARGET.findall(line.rest)[:1])
    return line.opcode
