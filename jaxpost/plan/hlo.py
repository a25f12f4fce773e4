"""What a compiled program computes, reads and sends, a device and a call, counted in its text.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel as nothing; this counts a loop as often as
it runs (`program.trips`) and a kernel as its `cost_estimate` says. The text is `compiled.as_text()`, for TPU or CPU.

FLOPs are those of `dot` and `convolution` (the TPU compiler turns products into convolutions) and of kernels;
elementwise work and reductions are not counted. Bytes of collectives are what a device receives from others in ring
algorithms, with n devices in a group: all-gather output * (n-1)/n, reduce-scatter output * (n-1), all-reduce
2 * size * (n-1)/n, all-to-all size * (n-1)/n, collective-permute its size.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction

from jaxpost.plan.groups import Axes
from jaxpost.plan.program import Computation, Operation, Part, Program, elements, parts, read, trips

HBM, HOST = 0, 5  # memory spaces of a layout, S(n)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_KIND = {kind: kind for kind in KINDS} | {f"{kind}-start": kind for kind in KINDS} | {"ragged-all-to-all": "all-to-all"}
# What the runtime between slices does for a `send` and `recv` of one slice's program.
_BETWEEN_SLICES = {"ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter", "ALL_TO_ALL": "all-to-all"}
_BETWEEN_SLICES |= {"ALL_REDUCE": "all-reduce"}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_GROUPS = re.compile(r"replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)")
_PAIRS = re.compile(r"source_target_pairs=(\{.*?\}\}|\{\})")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_COUNTS = re.compile(r"\b(feature_group_count|batch_group_count)=(\d+)")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_KERNELS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NAME = re.compile(r'op_name="([^"]*)"')
# What may lead from one memory to another.
_COPIES = {"copy", "copy-start", "slice-start", "dynamic-slice", "dynamic-slice-start"}
_COPIES |= {"dynamic-update-slice", "dynamic-update-slice-start"}
# Nothing is moved by these, or by what they call or began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "while", "conditional", "call", "send", "send-done", "recv", "recv-done", "async-update"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of collectives of a kind over the same axes: bytes that a device receives, how many run, bytes of all outputs."""

    bytes: int
    count: int
    output: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Calls of a Pallas kernel and their FLOPs; `estimated` is False where one carries no cost estimate (counts 0)."""

    count: int
    flops: int
    estimated: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop whose count was not exact: `trips` were counted, `how` is "at most" (it may end earlier) or "assumed"."""

    body: str
    op_name: str
    trips: int
    how: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """A device, a call. `collectives`: {(kind, axes of the mesh): Traffic}; axes ("?",) where they could not be told.

    hbm_bytes: an estimate: operands and results of the operations and fusions that run, where they lie in HBM, slices
    and updates in place counted as what they touch. Padding of layouts, spills and reuse within a kernel are not seen.
    host_bytes: of copies to or from the host's memory.
    between_slices: {kind: Traffic} over the data-centre network, along `slice_axes` of the mesh, in a program compiled
    for several slices; not in `collectives`.
    gathered, scattered: {axes: bytes} that an fsdp layout has to answer for: outputs of all-gathers and operands of
    reduce-scatters, whole. The TPU compiler turns some into rings of collective-permutes within products ("windowed
    einsum"; in `collectives` they stand under collective-permute): these count as the all-gather or reduce-scatter that
    would have received as much, n/(n-1) times what was, so that a ring's idle rounds show.
    """

    flops: int
    hbm_bytes: int
    host_bytes: int
    collectives: dict[tuple[str, tuple[str, ...]], Traffic]
    kernels: dict[str, Kernel]
    loops: tuple[Loop, ...]
    gathered: dict[tuple[str, ...], int]
    scattered: dict[tuple[str, ...], int]
    between_slices: dict[str, Traffic]
    slice_axes: tuple[str, ...]


def analyse(text: str, mesh_shape: dict[str, int], unknown_trips: int | Callable[[str], int] = 1) -> Costs:
    """Costs of `compiled.as_text()`.

    mesh_shape: {axis: size} of the mesh that the program was compiled for (`dict(mesh.shape)`).
    unknown_trips: how often a loop runs whose end depends on data, or a function of its `op_name`; such loops are
    listed in `loops`. Raises ValueError where the text is not a compiled program.
    """
    program = read(text)
    counter = _Counter(program, Axes(mesh_shape, program.partitions), unknown_trips)
    sums = counter.computation(program.entry, {})
    return Costs(
        flops=sums.numbers.get("flops", 0),
        hbm_bytes=sums.numbers.get("hbm", 0),
        host_bytes=sums.numbers.get("host", 0),
        collectives={key: Traffic(*row) for key, row in sorted(sums.collectives.items())},
        kernels={name: Kernel(*row, name not in sums.silent) for name, row in sorted(sums.kernels.items())},
        loops=tuple(sums.loops),
        gathered={axes: round(size) for (kind, axes), size in sums.moved.items() if kind == "gathered"},
        scattered={axes: round(size) for (kind, axes), size in sums.moved.items() if kind == "scattered"},
        between_slices={kind: Traffic(*row) for kind, row in sorted(sums.between.items())},
        slice_axes=counter.axes.across,
    )


class _Sums:
    """What adds up over operations, computations and trips."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.collectives: dict[tuple, tuple[int, ...]] = {}
        self.between: dict[str, tuple[int, ...]] = {}
        self.kernels: dict[str, tuple[int, ...]] = {}
        self.moved: dict[tuple, int | Fraction] = {}
        self.silent: set[str] = set()
        self.loops: list[Loop] = []

    def number(self, name: str, amount: int) -> None:
        self.numbers[name] = self.numbers.get(name, 0) + amount

    def move(self, key: tuple, amount: int | Fraction) -> None:
        self.moved[key] = self.moved.get(key, 0) + amount

    @staticmethod
    def row(rows: dict, key, amounts: tuple) -> None:
        rows[key] = tuple(a + b for a, b in zip(rows.get(key, (0,) * len(amounts)), amounts, strict=True))

    def add(self, other: "_Sums", times: int = 1) -> None:
        for name, amount in other.numbers.items():
            self.number(name, amount * times)
        for name in ("collectives", "between", "kernels"):
            for key, amounts in getattr(other, name).items():
                self.row(getattr(self, name), key, tuple(amount * times for amount in amounts))
        for key, amount in other.moved.items():
            self.move(key, amount * times)
        self.silent |= other.silent
        self.loops += other.loops


class _Counter:
    """Walks the computations that run."""

    def __init__(self, program: Program, axes: Axes, unknown_trips: int | Callable[[str], int]):
        self.program, self.axes, self.unknown_trips = program, axes, unknown_trips
        self.fused = functools.cache(self._fused)
        self.fusion_traffic = functools.cache(self._fusion_traffic)

    def computation(self, name: str, constants: dict[int, int]) -> _Sums:
        """Sums of what runs by itself. constants: known elements of its tuple, which bounds of inner loops may be."""
        computation, sums = self.program.computations[name], _Sums()
        for operation in computation.operations.values():
            if operation.code == "while":
                self._loop(sums, computation, operation, constants)
            elif operation.code == "conditional":
                branches = [self.computation(branch, {}) for branch in operation.branches]
                sums.add(max(branches, key=lambda branch: [branch.numbers.get(key, 0) for key in ("flops", "hbm")]))
            elif operation.code in ("call", "async-start"):
                called = operation.called("calls") or operation.called("to_apply")
                sums.add(self.computation(called, {}))
            elif operation.code == "fusion":
                sums.add(self.fused(operation.called()))
            else:
                self._arithmetic(sums, computation, operation)
                self._collective(sums, computation, operation)
            self._memory(sums, computation, operation)
        return sums

    def _loop(self, sums: _Sums, computation: Computation, loop: Operation, constants: dict[int, int]) -> None:
        found = trips(self.program, computation, loop, constants)
        count, how = found.count, found.how
        name = _NAME.search(loop.attributes)
        name = name[1] if name else ""
        if count is None:
            count = self.unknown_trips(name) if callable(self.unknown_trips) else self.unknown_trips
            how = "assumed"
        sums.add(self.computation(loop.called("body"), found.constants), count)
        if how != "exact":
            sums.loops.append(Loop(loop.called("body"), name, count, how))

    def _fused(self, name: str) -> _Sums:
        """Arithmetic and collectives within a fusion, and within fusions in it."""
        computation, sums = self.program.computations[name], _Sums()
        for operation in computation.operations.values():
            if operation.code == "fusion":
                sums.add(self.fused(operation.called()))
            else:
                self._arithmetic(sums, computation, operation)
                self._collective(sums, computation, operation, fused=True)
        return sums

    def _arithmetic(self, sums: _Sums, computation: Computation, operation: Operation) -> None:
        if operation.code == "dot":
            sums.number("flops", _dot_flops(operation, _shape(computation, operation.operands[0])))
        elif operation.code == "convolution":
            shapes = [_shape(computation, operand) for operand in operation.operands]
            sums.number("flops", _convolution_flops(operation, *shapes))
        elif operation.code == "custom-call" and _TARGET.search(operation.attributes)[1] in _KERNELS:
            estimate = _ESTIMATE.search(operation.attributes)
            kernel = re.sub(r"[.\d]+$", "", operation.name)
            flops = int(estimate[1]) if estimate else 0
            sums.number("flops", flops)
            sums.row(sums.kernels, kernel, (1, flops))
            sums.silent |= set() if estimate else {kernel}

    def _collective(self, sums: _Sums, computation: Computation, operation: Operation, fused: bool = False) -> None:
        kind = _KIND.get(operation.code)
        if operation.code == "recv":
            self._between_slices(sums, operation)
        elif kind == "collective-permute":
            self._permute(sums, computation, operation)
        elif kind is not None and not _resumed(computation, operation):
            axes, n = self.axes.of_groups(_GROUPS.search(operation.attributes)[1])
            size = sum(part.bytes for part in _output(operation))
            if kind == "all-reduce" and fused and _scattered(computation, operation.name):
                kind, size = "reduce-scatter", size // n
            if n > 1:
                sums.row(sums.collectives, (kind, axes), (_received(kind, size, n), 1, size))
            if n > 1 and kind == "all-gather":
                sums.move(("gathered", axes), size)
            elif n > 1 and kind == "reduce-scatter":
                sums.move(("scattered", axes), size * n)

    def _permute(self, sums: _Sums, computation: Computation, operation: Operation) -> None:
        axes = self.axes.of_pairs(_PAIRS.search(operation.attributes)[1])
        size = sum(part.bytes for part in _output(operation))
        if axes:
            sums.row(sums.collectives, ("collective-permute", axes), (size, 1, size))
            ring, n = _ring(self.program, computation, operation), self.axes.size(axes)
            if ring and n > 1:
                sums.move((ring, axes), Fraction(size * n, n - 1))

    def _between_slices(self, sums: _Sums, operation: Operation) -> None:
        """A `recv` that the runtime between slices fills: a device hands over its part, reduced or gathered there."""
        transfer = _TRANSFER.search(operation.attributes)
        if transfer is None:
            return
        kind = _BETWEEN_SLICES.get(transfer[1], "collective-permute")
        size = parts(operation.shape)[0].bytes
        received = size if kind == "collective-permute" else _received(kind, size, self.axes.slices)
        sums.row(sums.between, kind, (received, 1, size))

    def _memory(self, sums: _Sums, computation: Computation, operation: Operation) -> None:
        """Adds what an operation reads and writes in HBM, and copies to or from the host."""
        if operation.code in _FREE or operation.code.endswith("-done"):
            return
        if operation.code == "custom-call":
            if _TARGET.search(operation.attributes)[1] in ("AllocateBuffer", "ConcatBitcast"):
                return
            estimate = _ESTIMATE.search(operation.attributes)
            if estimate:
                sums.number("hbm", int(estimate[2]))
                return
        operands = [_parts(computation, operand) for operand in operation.operands]
        outputs = _output(operation)
        if operation.code in _COPIES and any(part.space == HOST for part in (*outputs, *operands[0])):
            moved = operands[1] if "update" in operation.code else outputs
            sums.number("host", sum(part.bytes for part in moved))
        if operation.code == "fusion":
            reads, written = self.fusion_traffic(operation.called())
            for read_bytes, operand in zip(reads, operands, strict=True):
                if any(part.space == HBM for part in operand):
                    sums.number("hbm", read_bytes)
            sums.number("hbm", written)
        else:
            sums.number("hbm", _plain_traffic(operation, operands, outputs))

    def _fusion_traffic(self, name: str) -> tuple[list[int], int]:
        """(bytes read of each parameter, bytes written to HBM) of a fused computation."""
        computation = self.program.computations[name]
        reads = [self._read(computation, parameter) for parameter in computation.parameters]
        root = computation.root
        written = root.operands if root.code == "tuple" else [root.name]
        return reads, sum(self._written(computation, computation.operations[part]) for part in written)

    def _read(self, computation: Computation, source: Operation) -> int:
        """Bytes of `source` that a fused computation reads: of slices what they cut, of updates in place nothing."""
        total, whole = 0, source.bytes
        for user, position in computation.users[source.name]:
            if user.code in ("dynamic-slice", "slice", "gather") and position == 0:
                total += user.bytes
            elif user.code == "bitcast" and not user.root:
                total += self._read(computation, user)
            elif user.code == "fusion":
                total += self.fusion_traffic(user.called())[0][position]
            elif not _passed_on(computation, user, position):
                return whole
        return min(total, whole)

    def _written(self, computation: Computation, result: Operation) -> int:
        """Bytes that a result of a fused computation takes in HBM to write."""
        while result.code == "bitcast" and parts(result.shape)[0].space == HBM:
            result = computation.operations[result.operands[0]]
        if result.code == "parameter" or _resumed(computation, result):
            return 0
        if any(part.space != HBM for part in parts(result.shape)):
            return 0
        if result.code == "dynamic-update-slice":
            return computation.operations[result.operands[1]].bytes
        return result.bytes


def _parts(computation: Computation, name: str) -> tuple[Part, ...]:
    operation = computation.operations.get(name)
    return parts(operation.shape) if operation else ()


def _shape(computation: Computation, name: str) -> tuple[int, ...]:
    return _parts(computation, name)[0].dims


def _output(operation: Operation) -> tuple[Part, ...]:
    """What an operation returns; of one that starts an asynchronous one, what that will return."""
    if operation.code.endswith("-start") and operation.shape.startswith("("):
        listed = elements(operation.shape)
        if operation.code == "copy-start":
            return parts(listed[0])
        if operation.code != "all-reduce-start":  # (operands, results, ...); an all-reduce's has results alone
            return parts(listed[1])
    return parts(operation.shape)


def _dot_flops(operation: Operation, lhs: tuple[int, ...]) -> int:
    contracted = _CONTRACTED.search(operation.attributes)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2 * math.prod(parts(operation.shape)[0].dims) * math.prod(lhs[dim] for dim in dims)


def _convolution_flops(operation: Operation, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """2 * products: for every spatial dimension the pairs of output and window position that meet the input, not its
    padding or the holes of a dilation. (Products become windows over padding; counted whole they would double.)"""
    left, right, result = _LABELS.search(operation.attributes).groups()
    out = parts(operation.shape)[0].dims
    counts = {name: int(count) for name, count in _COUNTS.findall(operation.attributes)}
    window = _WINDOW.search(operation.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    products = rhs[right.index("i")] * rhs[right.index("o")]
    products *= lhs[left.index("b")] // counts.get("batch_group_count", 1)
    for n in range(len(left) - 2):
        spatial = str(n)
        low, _, _ = fields.get("pad", "0_0" + "x0_0" * n).split("x")[n].partition("_")
        stride, base, holes = (
            int(fields.get(key, "1" + "x1" * n).split("x")[n]) for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        sizes = lhs[left.index(spatial)], rhs[right.index(spatial)], out[result.index(spatial)]
        products *= _meetings(*sizes, int(low), stride, base, holes)
    return 2 * products


@functools.lru_cache(maxsize=4096)
def _meetings(size: int, window: int, out: int, low: int, stride: int, base: int, holes: int) -> int:
    """Pairs (o, k) whose place o * stride + k * holes - low lies on an element of the input, `base` apart."""
    if base == 1 and low == 0 and (out - 1) * stride + (window - 1) * holes < size:
        return out * window
    span, count = (size - 1) * base, 0
    for k in range(window):
        for o in range(out):
            place = o * stride + k * holes - low
            count += 0 <= place <= span and place % base == 0
    return count


def _received(kind: str, size: int, n: int) -> int:
    """Bytes that a device receives, by the output's size; the table is in the file's docstring."""
    if kind == "reduce-scatter":
        return size * (n - 1)
    return size * (n - 1) * (2 if kind == "all-reduce" else 1) // n


def _resumed(computation: Computation, operation: Operation) -> bool:
    """Whether a collective within a fusion is a later step of one that another fusion began.

    The TPU compiler repeats it in every fusion that it runs beside; the first one's holds `AsyncCollectiveStart`.
    """
    if operation.code not in _KIND or "async_collective_fusion_config" not in operation.attributes:
        return False
    return not any('"AsyncCollectiveStart"' in user.attributes for user, _ in computation.users[operation.name])


def _passed_on(computation: Computation, user: Operation, position: int) -> bool:
    """Whether a use within a fusion reads nothing: it updates in place, returns, or carries on a collective."""
    if user.code == "dynamic-update-slice":
        return position == 0
    if user.code == "custom-call":
        return '"AsyncCollective' in user.attributes
    return (user.code == "tuple" and user.root) or _resumed(computation, user)


def _scattered(computation: Computation, name: str) -> bool:
    """Whether all that a fusion does with an all-reduce is to cut out the device's part: how a TPU scatters sums."""
    users = [user for user, _ in computation.users[name]]
    return bool(users) and all(
        _scattered(computation, user.name)
        if user.code in ("get-tuple-element", "bitcast")
        else user.code == "dynamic-slice"
        for user in users
    )


def _plain_traffic(operation: Operation, operands: list[tuple[Part, ...]], outputs: tuple[Part, ...]) -> int:
    """Bytes in HBM that an operation outside fusions reads and writes."""
    listed = [sum(part.bytes for part in operand if part.space == HBM) for operand in operands]
    written = sum(part.bytes for part in outputs if part.space == HBM)
    cut = sum(part.bytes for part in outputs)
    if operation.code in ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"):
        return min(cut, listed[0]) + sum(listed[1:]) + written
    if operation.code in ("dynamic-update-slice", "dynamic-update-slice-start"):
        return listed[1] + (sum(part.bytes for part in operands[1]) if listed[0] else 0)
    if operation.code == "scatter":
        return 2 * listed[-1] + listed[1]
    return sum(listed) + written


def _ring(program: Program, computation: Computation, operation: Operation) -> str | None:
    """ "gathered" or "scattered" where a permute is a step of an all-gather or reduce-scatter within a product.

    Such steps carry the product's name. Weights go round as they are; partial sums are what an addition made.
    """
    name = _NAME.search(operation.attributes)
    if name is None or not name[1].endswith(("dot_general", "ragged_dot")):
        return None
    if "windowed_dot_general_body_" in computation.name:
        return "scattered" if "body_rs" in computation.name else "gathered"
    source = computation.operations[operation.operands[0]]
    while source.code in ("bitcast", "copy", "get-tuple-element", "convert") and source.operands:
        source = computation.operations[source.operands[0]]
    if source.code == "while":
        return "scattered" if "body_rs" in (source.called("body") or "") else "gathered"
    if source.code == "broadcast":
        return "scattered"  # sums begin as zeros
    inner = program.computations.get(source.called() or "")
    codes = {inside.code for inside in inner.operations.values()} if inner and source.code == "fusion" else set()
    return "scattered" if codes & {"add", "convolution", "dot"} else "gathered"
