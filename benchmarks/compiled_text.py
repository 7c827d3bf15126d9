"""What a compiled program does, read from its text: loops, and what the chips send each other.

XLA counts the body of a loop once. Here it counts as often as it runs, where the loop's condition is a
comparison with a constant, as that of a scan is. The loop in a norm has no such condition and counts
once: it runs once, unless a square leaves its type's range.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jaxlib import xla_client

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
NAME = r"%?([\w.\-]+)"
HEADER = re.compile(rf"(ENTRY )?{NAME} \(.*\{{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
CALLS = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|select|scatter)=" + NAME
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
METADATA = re.compile(r", metadata=\{[^}]*\}")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """What the chips send each other at one place of the program.

    Attributes:
      kind: one of :data:`KINDS`.
      size: bytes of the whole array, before it is scattered or after it is gathered.
      chips: how many take part in it.
      times: how often it runs in a step.
    """

    kind: str
    size: float
    chips: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in one run, by the algorithm on a ring."""
        if self.kind == "collective-permute":
            return self.size
        share = self.size * (self.chips - 1) / self.chips
        return 2 * share if self.kind == "all-reduce" else share


class Program:
    """The computations of a program in XLA's text form."""

    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if header := HEADER.match(line):
                lines = self.computations[header[2]] = [line]
                self.entry = header[2] if header[1] else self.entry
            elif line.strip():
                lines.append(line)

    def times(self) -> dict[str, int]:
        """How often every computation runs in a step."""
        found: dict[str, int] = {}

        def visit(name: str, count: int) -> None:
            found[name] = found.get(name, 0) + count
            for line in self.computations[name][1:]:
                rounds = self.rounds(line)
                for called in _called(line):
                    visit(called, count * rounds)

        visit(self.entry, 1)
        return found

    def rounds(self, line: str) -> int:
        """How often the body of a loop runs; 1 for everything that is no loop of known length."""
        if " while(" not in line:
            return 1
        if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)', line):
            return int(known[1])
        condition = self.computations[re.search(rf"condition={NAME}", line)[1]]  # type: ignore[index]
        limits = [
            m[1] for m in map(re.compile(r"s32\[\]\S* constant\((\d+)\)").search, condition) if m
        ]
        is_count = any("compare(" in line and "direction=LT" in line for line in condition)
        return int(limits[0]) if is_count and len(limits) == 1 else 1

    def collectives(self) -> list[Collective]:
        """All of them; the parts into which XLA cuts an asynchronous one share a channel."""
        found: dict[str, Collective] = {}
        for name, times in self.times().items():
            for number, line in enumerate(self.computations[name]):
                matched = INSTRUCTION.match(line)
                kind = matched[2].removesuffix("-start") if matched else ""
                if matched is None or kind not in KINDS:
                    continue
                chips = _group_size(line)
                size = sum(map(_array_bytes, ARRAY.findall(matched[1])))
                if kind == "reduce-scatter":
                    size *= chips  # the text has what one chip gets
                elif matched[2] == "all-gather-start":
                    size *= chips / (chips + 1)  # the text has the input, too
                elif matched[2] == "collective-permute-start":
                    size /= 2  # likewise
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # how TPUs write it
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else f"{name} {number}"
                found.setdefault(key, Collective(kind, size, chips, times))
        return list(found.values())

    def in_loops(self, once: Callable[[str], float]) -> float:
        """By how much a measure of the text grows when loops count as often as they run.

        Args:
          once: the measure of a module's text, with every loop counted once.
        """

        def total(name: str) -> float:
            value = once(self.module(name))
            for line in self._lines_below(name):
                if (rounds := self.rounds(line)) > 1:
                    body = re.search(rf"body={NAME}", line)[1]  # type: ignore[index]
                    value += rounds * total(body) - once(self.module(body))
            return value

        whole = once(self.module(self.entry))
        return total(self.entry) / whole if whole else 1.0

    def module(self, name: str) -> str:
        """One computation, with those that it calls, as a module of its own."""
        needed: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in needed:
                return
            for line in self.computations[name][1:]:
                for called in (*_called(line), *re.findall(rf"condition={NAME}", line)):
                    visit(called)
            needed[name] = None

        visit(name)
        parts = ["HloModule part\n"]
        for part in needed:
            header, *body = self.computations[part]
            body = [
                METADATA.sub("", line) for line in body
            ]  # it refers to tables that are left out
            header = header.removeprefix("ENTRY ")
            parts.append("\n".join(["ENTRY " * (part == name) + header, *body]))
        return "\n\n".join(parts)

    def _lines_below(self, name: str) -> Iterator[str]:
        """The instructions of a computation and of what it calls, loops not entered."""
        for line in self.computations[name][1:]:
            yield line
            if " while(" not in line:
                for called in _called(line):
                    yield from self._lines_below(called)


def count_once(measure: str) -> Callable[[str], float]:
    """XLA's own count of a module's text, such as ``"flops"`` or ``"bytes accessed"``."""
    # JAX has no public name for either, and has moved the first one.
    place = getattr(xla_client, "hlo", xla_client._xla)
    client = jax.devices("cpu")[0].client

    def once(text: str) -> float:
        module = place.hlo_module_from_text(text)
        return xla_client._xla.hlo_module_cost_analysis(client, module).get(measure, 0.0)

    return once


def _called(line: str) -> list[str]:
    several = [name for names in BRANCHES.findall(line) for name in re.findall(NAME, names)]
    return [*CALLS.findall(line), *several]


def _array_bytes(array: tuple[str, str]) -> float:
    dtype, shape = array
    bits = BITS.get(dtype) or int(re.sub(r"^\D+|\D.*$", "", dtype) or 8)
    if dtype.startswith("f8"):
        bits = 8
    return math.prod(int(size) for size in shape.split(",") if size) * bits / 8


def _group_size(line: str) -> int:
    """How many chips take part, in the three ways in which XLA writes it."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(counted[2])
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return pairs[1].count("{") if pairs else 1
