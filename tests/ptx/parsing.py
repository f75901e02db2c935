"""Reads a kernel's PTX into a program for the engine: mnemonics with numbered registers.

Nothing is left out: a statement that is not understood is an error here, an instruction that the
engine does not know is one when the program is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# Lines for debuggers and the assembler's own hints; neither changes a result.
_IGNORED = re.compile(r"\.(loc|file|section|pragma)\b")
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z",
    "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid",
)  # fmt: skip
# The launch's shared memory, at address 0 of its own space.
_SHARED = "global_smem"
# Where a mov takes or gives a vector, it cuts or joins registers.
_JOIN, _CUT = "join", "cut"


class NotTranslated(Exception):
    """A statement of PTX that has no meaning here."""


class Parameter(NamedTuple):
    """A kernel parameter: where it lies among the others, in bytes; 128 are a tensor map."""

    offset: int
    size: int


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: mnemonic with all of its suffixes.
        predicate: number of the register that guards it, or -1.
        negated: whether it runs where the guard is false.
        line: of the PTX.
        operands: numbers of registers; an address is a register and an offset, or the coordinates
            in a tensor, a label the number of an instruction.
    """

    name: str
    predicate: int
    negated: bool
    line: int
    operands: tuple[int, ...]


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of the entry.
        threads: of a block.
        parameters: in order.
        instructions: in order.
        constants: values by register; registers of the machine by name; all others are variables.
        registers: how many there are.
    """

    name: str
    threads: int
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    constants: dict[int, int] = field(default_factory=dict)
    special: dict[int, str] = field(default_factory=dict)
    registers: int = 0


def parse(ptx: str) -> Program:
    """The one kernel of a module.

    Raises:
        NotTranslated: a statement that is not understood, with its line.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S))
    if len(entries) != 1:
        raise NotTranslated(f"expected one kernel, got {len(entries)}")
    if set(re.findall(r"^[\s.\w]*\.shared\s[^;\n]*?([\w$]+)\[", text, re.M)) - {_SHARED}:
        raise NotTranslated("shared memory other than the launch's")
    name, parameters, directives, begin = *entries[0].groups(), entries[0].end()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise NotTranslated("a kernel without its number of threads")
    reader = _Reader(Program(name, int(threads[1]), []))
    reader.parameters(parameters)
    reader.body(text, begin)
    return reader.program


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        # by the block that they are in, a number for each that is open
        self.labels: dict[tuple[tuple[int, ...], str], int] = {}
        self.scope: tuple[int, ...] = ()
        self.line = 0

    def parameters(self, text: str) -> None:
        offset = 0
        for declared in filter(None, map(str.strip, text.split(","))):
            match = re.fullmatch(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+(?:\.ptr.*\s)?"
                r"([\w$]+)(?:\[(\d+)\])?", declared
            )  # fmt: skip
            if match is None:
                raise NotTranslated(f"parameter {declared}")
            size = _SIZES[match[2]] * int(match[4] or 1)
            alignment = int(match[1] or size)
            offset = -(-offset // alignment) * alignment
            self.offsets[match[3]] = offset
            self.program.parameters.append(Parameter(offset, size))
            offset += size

    def body(self, text: str, begin: int) -> None:
        scope, opened, self.line = (0,), 0, text.count("\n", 0, begin) + 1
        statements = []
        for row in text[begin:].split("\n"):
            for piece in [] if _IGNORED.match(row.strip()) else _pieces(row):
                if piece == "{":
                    opened += 1
                    scope += (opened,)
                elif piece == "}":
                    scope = scope[:-1]
                else:
                    statements.append((self.line, scope, piece))
                if not scope:
                    break
            if not scope:
                break
            self.line += 1
        code = []
        for self.line, self.scope, statement in statements:
            while match := re.match(r"([$\w]+):\s*", statement):
                self.labels[self.scope, match[1]] = len(code)
                statement = statement[match.end() :]
            if match := re.match(r"\.reg\s+\.\w+\s+(.*)", statement):
                self._declare(match[1])
            elif statement:
                code.append((self.line, self.scope, statement))
        for self.line, self.scope, statement in code:
            self.program.instructions.append(self._instruction(statement))

    def _declare(self, names: str) -> None:
        for name in map(str.strip, names.split(",")):
            if match := re.fullmatch(r"(%\w+)<(\d+)>", name):
                for i in range(int(match[2])):
                    self._number(f"{match[1]}{i}")
            else:
                self._number(name)

    def _number(self, name: str) -> int:
        if name not in self.numbers:
            self.numbers[name] = self.program.registers
            self.program.registers += 1
        return self.numbers[name]

    def _instruction(self, statement: str) -> Instruction:
        guard = re.match(r"@(!?)(%?\w+)\s+", statement)
        match = re.fullmatch(r"([\w.:]+)\s*(.*)", statement[guard.end() if guard else 0 :], re.S)
        if match is None:
            raise self._error(statement)
        name, operands = match[1].replace(".uni", ""), _split(match[2])
        if name.startswith("mov.") and len(operands) == 2:
            vectors = [operand.startswith("{") for operand in operands]
            kinds = {(True, False): _CUT, (False, True): _JOIN}
            if kind := kinds.get(tuple(vectors)):
                parts = len(_split(operands[vectors.index(True)][1:-1]))
                name = name.replace("mov", kind) + f".{parts}"
        found = tuple(number for operand in operands for number in self._operand(name, operand))
        predicate = self._known(guard[2]) if guard else -1
        return Instruction(name, predicate, bool(guard and guard[1]), self.line, found)

    def _operand(self, name: str, text: str) -> list[int]:
        if text.startswith("{"):
            return [n for part in _split(text[1:-1]) for n in self._operand(name, part)]
        if match := re.fullmatch(r"\[\s*([^\s+,]+)\s*,\s*\{(.*)\}\s*\]", text):
            return [self._value(part) for part in (match[1], *_split(match[2]))]
        if match := re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text):
            offset = int(match[2] or "0", 0)
            if match[1] in self.offsets:
                return [self.offsets[match[1]] + offset]
            return [self._value(match[1]), offset]
        if name == "bra":
            for depth in range(len(self.scope), 0, -1):
                if (label := (self.scope[:depth], text)) in self.labels:
                    return [self.labels[label]]
            raise self._error(f"label {text}")
        if match := re.fullmatch(r"(%\w+)\|(%\w+)", text):
            return [self._known(match[1]), self._known(match[2])]
        return [self._value(text)]

    def _value(self, text: str) -> int:
        if text in SPECIAL:
            number = self._number(text)
            self.program.special[number] = text
            return number
        if text in self.numbers and not text.startswith("#"):
            return self.numbers[text]
        if text == "_":
            return self._number("#nowhere")
        if text in self.offsets:
            return self._constant(self.offsets[text])
        if text == _SHARED:
            return self._constant(0)
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text):
            return self._constant(int(match[1], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self._constant(int(text.rstrip("U"), 0))
        raise self._error(f"operand {text}")

    def _constant(self, value: int) -> int:
        number = self._number(f"#{value}")
        self.program.constants[number] = value & (2**64 - 1)
        return number

    def _known(self, name: str) -> int:
        if name not in self.numbers:
            raise self._error(f"register {name}")
        return self.numbers[name]

    def _error(self, what: str) -> NotTranslated:
        return NotTranslated(f"line {self.line}: {what}")


def _pieces(row: str) -> list[str]:
    """Statements of a row, and the braces that open and close blocks rather than vectors."""
    pieces, current, depth = [], "", 0
    for char in row:
        block = (char == "{" and not current.strip()) or (char == "}" and depth == 0)
        if block or (char == ";" and depth == 0):
            pieces += [current.strip()] if current.strip() else []
            pieces += [char] if block else []
            current = ""
            continue
        depth += (char == "{") - (char == "}")
        current += char
    if current.strip():
        pieces.append(current.strip())
    return pieces


def _split(text: str) -> list[str]:
    """Operands: at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts
