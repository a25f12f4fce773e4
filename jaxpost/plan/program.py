"""The text of a compiled program (optimized HLO) as computations of operations, and how often its loops run."""

import dataclasses
import functools
import re
from collections.abc import Iterator

# name = shape opcode(operands), attributes. A tuple's shape is matched up to `) opcode(`; layouts hold no spaces.
_OPERATION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|[^\s(]\S*) ([a-z][\w\-]*)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"direction=([A-Z]+)")
# Operations whose value is that of their first operand, as far as counting goes.
_SAME = {"bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "reshape"}
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Part:
    """An array of a shape: `dtype[dims]`, and the memory that it lies in (0: HBM, 1: VMEM of a TPU, 5: the host)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        bits = 8 if self.dtype == "pred" else int((_BITS.search(self.dtype) or ["0"])[0])
        count = 1
        for size in self.dims:
            count *= size
        return (count * bits + 7) // 8


@functools.lru_cache(maxsize=1 << 16)
def parts(shape: str) -> tuple[Part, ...]:
    """The arrays of a shape, nested tuples flattened; tokens hold nothing.

    >>> parts("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[])")
    (Part(dtype='bf16', dims=(2, 3), space=1), Part(dtype='u32', dims=(), space=0))
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in ("token", "opaque"):
            space = _SPACE.search(layout) if layout else None
            sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
            found.append(Part(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, or the shape itself.

    >>> elements("((f32[2]{0}), f32[4]{0:T(8)}, /*index=2*/u32[])")
    ['(f32[2]{0})', 'f32[4]{0:T(8)}', '/*index=2*/u32[]']
    """
    if not shape.startswith("("):
        return [shape]
    found, depth, start = [], 0, 1
    for at, letter in enumerate(shape):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if (letter == "," and depth == 1) or depth == 0:
            found.append(shape[start:at].strip())
            start = at + 1
    return [element for element in found if element]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One line: `name = shape code(inside), attributes`; `root`: what its computation returns."""

    name: str
    shape: str
    code: str
    inside: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of operations of the same computation."""
        return _OPERAND.findall(self.inside)

    @property
    def bytes(self) -> int:
        """Of everything that it returns, wherever that lies."""
        return sum(part.bytes for part in parts(self.shape))

    def called(self, kind: str = "calls") -> str | None:
        """The computation that an attribute (`calls`, `body`, `condition`, `to_apply`) names."""
        return dict(_CALLED.findall(self.attributes)).get(kind)

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return [name.strip().lstrip("%") for name in listed[1].split(",")]
        named = dict(_CALLED.findall(self.attributes))
        return [named[kind] for kind in ("true_computation", "false_computation") if kind in named]


@dataclasses.dataclass
class Computation:
    """Operations by name, in the order in which they run."""

    name: str
    operations: dict[str, Operation]

    @functools.cached_property
    def root(self) -> Operation:
        """What it returns."""
        last = None
        for last in self.operations.values():
            if last.root:
                return last
        return last

    @functools.cached_property
    def parameters(self) -> list[Operation]:
        """In the order of their numbers."""
        found = [operation for operation in self.operations.values() if operation.code == "parameter"]
        return sorted(found, key=lambda operation: int(operation.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Operation, int]]]:
        """{name: [(an operation that reads it, as which of its operands)]}"""
        found = {name: [] for name in self.operations}
        for operation in self.operations.values():
            for position, operand in enumerate(operation.operands):
                if operand in found:
                    found[operand].append((operation, position))
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name; `entry` is what runs; `partitions`: devices that the groups of its collectives count."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def read(text: str) -> Program:
    """Computations of `compiled.as_text()`. Raises ValueError for a text without an ENTRY."""
    computations, entry, current = {}, None, None
    lines = iter(text.splitlines())
    header = next(lines, "")
    for line in lines:
        if line[:1] in (" ", "\t"):
            operation = _operation(line) if current is not None else None
            if operation is not None:
                current.operations[operation.name] = operation
        elif line.endswith("{") and "->" in line and (match := _HEADER.match(line)):
            current = computations[match[2]] = Computation(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", header)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _operation(line: str) -> Operation | None:
    match = _OPERATION.match(line)
    if match is None:
        return None
    start = match.end()
    end = line.find(")", start)
    opened = line.find("(", start, end)
    while opened >= 0:  # operands with shapes, whose layouts hold parentheses
        end = line.find(")", end + 1)
        opened = line.find("(", opened + 1, end)
    return Operation(match[2], match[3], match[4], line[start:end], line[end + 1 :], match[1] is not None)


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often a loop runs; `how`: "exact", "at most" (it may end earlier) or "unknown" (count is None)."""

    count: int | None
    how: str
    constants: dict[int, int]  # elements of the loop's tuple that never change, for the loops within


def trips(program: Program, computation: Computation, loop: Operation, constants: dict[int, int]) -> Trips:
    """How often `loop`, a `while` of `computation`, runs.

    From `known_trip_count` where XLA wrote it (CPU); else from the condition `compare(i, n), direction=LT`, where i
    begins at and grows by constants (TPU). `constants`: elements of the computation's own tuple that are known.
    """
    body = program.computations[loop.called("body")]
    condition = program.computations[loop.called("condition")]
    known = _TRIPS.search(loop.attributes)
    start = _Values(program, computation, constants).elements(loop.operands[0])
    step = _Values(program, body, {}).elements(body.root.name)
    fixed = {i: start[i][1] for i, moved in step.items() if moved == (i, 0) and start.get(i, (0, 0))[0] is None}
    if known:
        return Trips(int(known[1]), "exact", fixed)
    step |= {i: value for i, value in _Values(program, body, fixed).elements(body.root.name).items() if i not in fixed}
    for bound in _Values(program, condition, fixed).bounds(condition.root.name):
        (index, offset), direction, limit, alone = bound
        if start.get(index, (0, 0))[0] is None and index in start and step.get(index, (None, 0))[0] == index:
            count = _count(start[index][1] + offset, step[index][1], direction, limit)
            if count is not None:
                return Trips(count, "exact" if alone else "at most", fixed)
    return Trips(None, "unknown", fixed)


def _count(value: int, step: int, direction: str, limit: int) -> int | None:
    """How often `while value <direction> limit: value += step` runs; None where that has no end."""
    if direction in ("GT", "GE"):
        value, step, limit = -value, -step, -limit
    if step <= 0 and direction != "NE":
        return None
    if direction == "NE":
        count, rest = divmod(limit - value, step) if step else (-1, 0)
        return count if count >= 0 and not rest else None
    return max(0, -((value - limit - (direction in ("LE", "GE"))) // step))


class _Values:
    """Integers of a computation: `(element, offset)`, an element of its tuple and a constant, or `(None, constant)`."""

    def __init__(
        self, program: Program, computation: Computation, constants: dict[int, int], arguments: list | None = None
    ):
        self.program, self.computation, self.constants, self.arguments = program, computation, constants, arguments

    def elements(self, name: str) -> dict[int, tuple[int | None, int]]:
        """{i: value} of the scalars of the tuple `name` that can be told."""
        operation = self.computation.operations[name]
        while operation.code in _SAME:
            operation = self.computation.operations[operation.operands[0]]
        if operation.code == "parameter":
            return {i: self._element(i) for i in range(len(elements(operation.shape)))}
        if operation.code != "tuple":
            return {}
        values = {}
        for i, operand in enumerate(operation.operands):
            shape = parts(self.computation.operations[operand].shape)
            if len(shape) == 1 and not shape[0].dims and (value := self.value(operand)) is not None:
                values[i] = value
        return values

    def value(self, name: str) -> tuple[int | None, int] | None:
        """Of a scalar; None where it is more than an element plus a constant."""
        operation = self.computation.operations.get(name)
        if operation is None:
            return None
        if operation.code == "constant":
            return (None, int(operation.inside)) if operation.inside.lstrip("-").isdigit() else None
        if operation.code == "parameter":
            return self.arguments[int(operation.inside)] if self.arguments is not None else None
        if operation.code in _SAME:
            return self.value(operation.operands[0])
        if operation.code == "get-tuple-element":
            return self._taken(operation)
        if operation.code in ("add", "subtract"):
            return self._sum(*map(self.value, operation.operands), -1 if operation.code == "subtract" else 1)
        if operation.code in ("fusion", "call"):
            inner = self._inner(operation)
            return inner.value(inner.computation.root.name)
        return None

    def bounds(self, name: str, alone: bool = True) -> Iterator[tuple[tuple[int, int], str, int, bool]]:
        """(value, direction, limit, alone) of the comparisons that a condition joins by `and` (not alone) or is."""
        operation = self.computation.operations[name]
        if operation.code in _SAME:
            yield from self.bounds(operation.operands[0], alone)
        elif operation.code == "and":
            for operand in operation.operands:
                yield from self.bounds(operand, False)
        elif operation.code in ("fusion", "call"):
            inner = self._inner(operation)
            yield from inner.bounds(inner.computation.root.name, alone)
        elif operation.code == "compare":
            left, right = map(self.value, operation.operands)
            direction = _DIRECTION.search(operation.attributes)[1]
            if left and right and direction in _FLIPPED:
                if left[0] is None:
                    left, right, direction = right, left, _FLIPPED[direction]
                if left[0] is not None and right[0] is None:
                    yield left, direction, right[1], alone

    def _element(self, index: int) -> tuple[int | None, int]:
        return (None, self.constants[index]) if index in self.constants else (index, 0)

    def _taken(self, operation: Operation) -> tuple[int | None, int] | None:
        index = int(_INDEX.search(operation.attributes)[1])
        source = self.computation.operations[operation.operands[0]]
        while source.code in _SAME:
            source = self.computation.operations[source.operands[0]]
        if source.code == "parameter" and self.arguments is None:
            return self._element(index)
        return self.value(source.operands[index]) if source.code == "tuple" else None

    @staticmethod
    def _sum(left, right, sign: int) -> tuple[int | None, int] | None:
        if left is None or right is None or (right[0] is not None and (sign < 0 or left[0] is not None)):
            return None
        return (right[0] if left[0] is None else left[0], left[1] + sign * right[1])

    def _inner(self, operation: Operation) -> "_Values":
        called = operation.called("calls") or operation.called("to_apply")
        return _Values(
            self.program, self.program.computations[called], {}, [self.value(operand) for operand in operation.operands]
        )
