"""What runs in a program that XLA has compiled, and how often, from its text."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
      name: without "%".
      result: its type, as written.
      opcode: "fusion", "custom-call", "sort", ...
      arguments: within the parentheses.
      attributes: the rest of the line.
    """

    name: str
    result: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return re.findall(r"%([^\s,()]+)", self.arguments)

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the result, or of the parts of a tuple."""
        return [dims for _, dims in _arrays(self.result)]

    @property
    def bytes(self) -> int:
        """Of the result; of a tuple, of all parts."""
        return sum(_item_bytes(kind) * math.prod(dims) for kind, dims in _arrays(self.result))

    def number(self, name: str) -> int | None:
        """An attribute that the compiler adds, such as "estimated_cycles"; None without."""
        found = re.search(rf'"{name}":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def called(self, role: str) -> str:
        """The computation that is its "body", "condition", ..."""
        (name,) = re.findall(rf"\b{role}=%([\w.\-]+)", self.attributes)
        return name

    @property
    def group_size(self) -> int:
        """Devices that a collective is among: its first group's, all groups being alike."""
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", self.attributes):
            return int(found[2])
        found = re.search(r"replica_groups=\{\{([\d,]*)\}", self.attributes)
        if found is None:
            raise ValueError(f"which devices {self.name} is among is not known")
        return found[1].count(",") + 1


Computation = dict[str, Instruction]


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in found]


def _item_bytes(kind: str) -> int:
    bits = re.sub(r"\D", "", kind)  # pred has none
    return max(1, int(bits or 8) // 8)


def _closing(line: str, at: int) -> int:
    """The place behind the parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"an instruction does not end: {line[:200]}")


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%(\S+) = ", line)
    if match is None:
        return None
    begin = match.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    opcode, arguments = line[end:opened].strip(), line[opened + 1 : closed - 1]
    return Instruction(match[1], line[begin:end], opcode, arguments, line[closed:])


class Program:
    """A program's computations.

    Args:
      text: of the optimised program, as JAX's `Compiled.as_text` gives it.
      trips: of loops that run until something has happened; None refuses them.
    """

    def __init__(self, text: str, trips: int | None = None):
        self.trips = trips
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found := _instruction(line):
                current[found.name] = found

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs on its own, its computation, and how many times it runs.

        Loops and calls are followed; fusions are one instruction.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for each in computation.values():
            if each.opcode == "while":
                yield from self._executed(each.called("body"), times * self._trips(each))
            elif each.opcode == "call":
                yield from self._executed(each.called("to_apply"), times)
            elif each.opcode == "conditional":
                raise ValueError(f"how often the branches of {each.name} run is not known")
            else:
                yield each, computation, times

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or until a counter from 0 on has a value."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        *others, last = self.computations[loop.called("condition")].values()
        bounds = [x.arguments for x in others if x.opcode == "constant"]
        if len(bounds) != 1 or last.opcode != "compare" or "direction=LT" not in last.attributes:
            if self.trips is not None:
                return self.trips
            raise ValueError(f"how often {loop.name} runs is not known")
        return int(bounds[0])

    def sent(self) -> dict[str, int]:
        """Bytes that a device sends to others, by kind of collective, in one run."""
        total = dict.fromkeys(COLLECTIVES, 0)
        for each, computation, times in self.executed():
            for found, inside in self._collectives(each, computation):
                kind = found.opcode.removesuffix("-start")
                total[kind] += times * _sent(kind, found, inside)
        return total

    def _collectives(
        self, each: Instruction, computation: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """The instruction, if it is a collective, or those of the computation that it calls."""
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            yield each, computation
        elif each.opcode in ("fusion", "async-start"):
            inside = self.computations[each.called("calls")]
            for inner in inside.values():
                yield from self._collectives(inner, inside)


def _sent(kind: str, each: Instruction, computation: Computation) -> int:
    size = sum(computation[name].bytes for name in each.operands)
    if kind == "collective-permute":
        return size
    others = each.group_size - 1
    if kind == "all-gather":
        return size * others
    return (2 if kind == "all-reduce" else 1) * size * others // each.group_size
