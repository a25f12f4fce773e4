"""What a run of a config needs on hardware that is not here: memory, work, wires, time, money; compiled, not guessed.

For a TPU topology each program of the run is compiled by the real compiler from shapes alone. For GPUs, whose compiler
needs the GPU, all is counted from shapes (plan/ledger.py) and said to be an estimate.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import time
from importlib import metadata
from typing import Any

import jax

from jaxpost import config as configs
from jaxpost.errors import ConfigError
from jaxpost.plan import chips, hlo, ledger
from jaxpost.plan.roofline import Roofline, rates, roofline
from jaxpost.stages import RUN
from jaxpost.train import planned
from jaxpost.train.folder import model_folder
from jaxpost.train.objectives import DEFAULT_CHUNK_TOKENS
from jaxpost.train.setup import cache_folder

GIB = 1 << 30
RATE_OF_HOST = 16e9  # bytes/s that a chip exchanges with its host's memory: PCIe 3 x16; not published of TPUs
# What the compiler says of a program that is too large: of its temporaries, or of all it needs.
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM")
_ALL = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program of a run. Bytes, FLOPs and seconds are of a device and a call.

    ledger: {what: bytes}, counted from shapes. peak: what the compiler says the program needs at once; None: not
    compiled. elsewhere: bytes that lie on the device beside it. collectives: {"kind over axes": bytes received}.
    roofline: {"compute", "memory", ...: seconds}. calls: of it in a step.
    """

    name: str
    calls: float
    ledger: dict[str, int]
    elsewhere: int
    arguments: int | None
    temporaries: int | None
    peak: int | None
    host: int
    flops: float
    model_flops: float  # of all devices
    hbm_bytes: float | None
    collectives: dict[str, float]
    gathered: dict[str, float]
    roofline: dict[str, float]
    bound: str
    tokens: int  # of all devices
    compile_seconds: float | None
    failure: str | None = None

    @property
    def seconds(self) -> float:
        """At least, if all overlaps."""
        return max(self.roofline.values())

    @property
    def counted(self) -> int:
        """Bytes by the ledger."""
        return sum(self.ledger.values())

    @property
    def needs(self) -> int:
        """Bytes of a device while it runs."""
        return (self.counted if self.peak is None else self.peak) + self.elsewhere


@dataclasses.dataclass(frozen=True)
class TopologyPlan:
    """A config on a topology. estimated: nothing was compiled."""

    topology: str
    devices: int
    mesh: dict[str, int]
    estimated: bool
    usable: int
    programs: tuple[ProgramPlan, ...]
    tokens: int  # of a step, in its rows
    seconds: float  # of a step, at least
    tokens_per_second: float  # at most
    mfu: float  # at most
    cost_per_step: float | None
    cost_per_billion_tokens: float | None
    version: str  # of code and compilers

    @property
    def peak(self) -> int:
        return max(program.needs for program in self.programs)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable and not any(program.failure for program in self.programs)


def plan(config, topology: str, *, cache: bool = True) -> TopologyPlan:
    """The plan of a resolved config on `topology` (`v5e:4x4`, `h100:8`), from the cache where it was made before.

    Raises ConfigError for a topology that there is none of, and whatever the config cannot do on its devices.
    """
    config = as_planned(config)
    chip, _ = chips.describe(topology)
    path = cache_folder() / "plans" / f"{_digest(config, topology)}.json"
    if cache and path.exists():
        return from_json(path.read_text())
    tpu = chip.platform == "tpu"  # of which there is a compiler here
    found = planned_on(config, topology, chip, open_devices(config, topology), chips.dimensions(topology), compiled=tpu)
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(found))
    return found


def as_planned(config):
    """The config without what says where a run lies: a plan writes nothing and goes on from nothing."""
    run = dataclasses.replace(config.run, dir=None, resume=False, steps=config.run.steps or 1000, epochs=None)
    return dataclasses.replace(config, run=run)


def open_devices(config, topology: str) -> list:
    """Devices of the topology, as the config's slices need them; of GPUs devices that only have a number."""
    chip, count = chips.describe(topology)
    slices = max(config.mesh.slices, 1)
    if chip.platform == "tpu":
        return chips.open_topology(topology, slices)
    for name, on in dataclasses.asdict(config.offload).items():
        if on:  # jax names kinds of memory of real devices alone
            raise ConfigError(
                f"offload.{name}: True, which is planned for TPUs only; set False for topology {topology}"
            )
    return [_Described(n, "gpu") for n in range(count)]


@dataclasses.dataclass(frozen=True)
class _Described:
    """A device that is only counted."""

    id: int
    platform: str
    process_index: int = 0
    device_kind: str = "described"


def estimate(config, topology: str) -> TopologyPlan:
    """The plan without a compiler: a second instead of minutes. Of memory it knows the ledger."""
    chip, _ = chips.describe(topology)
    devices = open_devices(config, topology)
    return planned_on(as_planned(config), topology, chip, devices, chips.dimensions(topology), compiled=False)


def planned_on(config, topology: str, chip, devices, dims: tuple[int, ...], *, compiled: bool) -> TopologyPlan:
    """The plan over these devices of a chip, that lie in a torus of sides `dims`."""
    found = planned.gone_through(RUN[config.stage], config, devices)
    network = config.plan.network_gbytes_per_s and config.plan.network_gbytes_per_s * 1e9
    programs = []
    for program in found.programs:
        work = {"chip": chip, "dims": dims, "network": network, "mesh": found.mesh}
        work["elsewhere"] = _elsewhere(program, found.programs)
        programs.append(_compiled(program, **work) if compiled else _counted(program, **work))
    return _summed(config, topology, chip, found.mesh, tuple(programs), not compiled)


def _elsewhere(program, programs) -> int:
    """Bytes of the run that lie on a device while one of its programs runs, besides that one's own."""
    scoring = {name: tree for one in programs for name, tree in one.ledger.items() if name == "reward"}
    resident = {name: tree for name, tree in programs[0].ledger.items() if name != "batch"} | scoring
    others = sum(ledger.held(tree) for name, tree in resident.items() if name not in program.ledger)
    return others - ledger.held(program.ledger.get("policy", ()))  # which is read out of what trains


def _compiled(program, *, chip, dims, network, elsewhere, mesh) -> ProgramPlan:
    """By the compiler."""
    counted = ledger.ledger(program, mesh)
    common = _common(program, counted, elsewhere)
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            executable = program.fn.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        estimated = _counted(program, chip=chip, dims=dims, network=network, elsewhere=elsewhere, mesh=mesh)
        return dataclasses.replace(estimated, **_refused(str(error), program, error))
    seconds = time.perf_counter() - began
    memory = executable.memory_analysis()
    costs = hlo.analyse(executable.as_text(), dict(mesh.shape), _trips(program, mesh))
    costs = dataclasses.replace(costs, flops=costs.flops - _idle_experts(costs, mesh))
    line = roofline(costs, chip, dict(mesh.shape), dims, network)
    times = _times(line, costs.host_bytes)
    named = {f"{kind} over {' x '.join(axes)}": float(t.bytes) for (kind, axes), t in costs.collectives.items()}
    named |= {f"{kind} over slices": float(t.bytes) for kind, t in costs.between_slices.items()}
    # What the compiler calls the peak counts arguments that wait in the host's memory too.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    return ProgramPlan(
        **common,
        arguments=memory.argument_size_in_bytes,
        temporaries=peak - memory.argument_size_in_bytes,
        peak=peak,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        flops=float(costs.flops),
        hbm_bytes=float(costs.hbm_bytes),
        collectives=named,
        gathered={" x ".join(axes): float(size) for axes, size in costs.gathered.items()},
        roofline=times,
        bound=max(times, key=times.get),
        compile_seconds=seconds,
    )


def _refused(said: str, program, error) -> dict[str, Any]:
    """What is known of a program that the compiler refuses for its size; raises any other error again."""
    for pattern, beside in ((_TEMPORARIES, sum(map(ledger.held, program.ledger.values()))), (_ALL, 0)):
        if used := pattern.search(said):
            peak = int(float(used[1]) * _UNITS[used[2]]) + beside
            return {"peak": peak, "failure": "the compiler refuses it for its size"}
    raise error


def _counted(program, *, chip, dims, network, elsewhere, mesh) -> ProgramPlan:
    """From shapes."""
    counted, sent = ledger.ledger(program, mesh), ledger.moved(program, mesh)
    flops = ledger.computed_flops(program) / mesh.size
    traffic = {
        ("all-gather", ("fsdp",)): hlo.Traffic(int(sent.gathered), 0, 0),
        ("reduce-scatter", ("fsdp",)): hlo.Traffic(int(sent.reduced), 0, 0),
    }
    moments = counted.get("moments", 0)
    # Every weight is read once a pass, and an update reads and writes what trains.
    hbm = sum(counted.values()) * max(1.0, program.passes / 3) + 2 * moments
    costs = hlo.Costs(int(flops), int(hbm), 0, traffic, {}, (), {}, {}, {}, ())
    times = _times(roofline(costs, chip, dict(mesh.shape), dims, network), 0)
    return ProgramPlan(
        **_common(program, counted, elsewhere),
        arguments=None,
        temporaries=None,
        peak=None,
        host=sum(ledger.held(tree, host=True) for tree in program.ledger.values()),
        flops=flops,
        hbm_bytes=hbm,
        collectives={f"{kind} over fsdp": float(t.bytes) for (kind, _), t in traffic.items() if t.bytes},
        gathered={},
        roofline=times,
        bound=max(times, key=times.get),
        compile_seconds=None,
    )


def _common(program, counted, elsewhere) -> dict[str, Any]:
    return {
        "name": program.name,
        "calls": program.calls,
        "ledger": counted,
        "elsewhere": elsewhere,
        "model_flops": ledger.model_flops(program),
        "tokens": math.prod(program.rows),
    }


def _times(line: Roofline, host_bytes: int) -> dict[str, float]:
    return line.limits | ({"host": host_bytes / RATE_OF_HOST} if host_bytes else {})


def _idle_experts(costs: hlo.Costs, mesh) -> int:
    """FLOPs counted of grouped products (megablox) and not done: rows of other devices' experts, the load even."""
    grouped = sum(kernel.flops for name, kernel in costs.kernels.items() if name in ("gmm", "tgmm"))
    return grouped - grouped // mesh.shape["expert"]


def _trips(program, mesh) -> int:
    """Trips of a loop that data ends: of a block of steps all, of the head's positions as if all were scored."""
    if program.name == "decode":
        return int(program.passes)
    return math.ceil(ledger.local_tokens(program.rows, mesh) / DEFAULT_CHUNK_TOKENS)


def _summed(config, topology, chip, mesh, programs, estimated: bool) -> TopologyPlan:
    """A step: its programs one after another."""
    seconds = sum(program.seconds * program.calls for program in programs)
    first = programs[0]
    tokens = first.tokens * config.batch.accumulate if len(programs) == 1 else first.tokens
    made = rates(
        seconds,
        chip,
        mesh.size,
        tokens=tokens,
        model_flops=sum(program.model_flops * program.calls for program in programs),
        price_per_chip_hour=config.plan.price_per_chip_hour,
    )
    return TopologyPlan(
        topology=topology,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        estimated=estimated,
        usable=chip.usable_bytes,
        programs=programs,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=made.tokens_per_second,
        mfu=made.mfu,
        cost_per_step=made.cost_per_step,
        cost_per_billion_tokens=made.cost_per_billion_tokens,
        version=version(),
    )


# ---- cache ----


def to_json(found: TopologyPlan) -> str:
    return json.dumps(dataclasses.asdict(found), indent=1)


def from_json(text: str) -> TopologyPlan:
    values = json.loads(text)
    return TopologyPlan(**values | {"programs": tuple(ProgramPlan(**one) for one in values["programs"])})


@functools.cache  # it reads all our files, and a search asks for every candidate
def version() -> str:
    """Of what a plan depends on besides its config: our code, jax and the TPU compiler."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    names = ("jax", "jaxlib", "flax", "optax", "libtpu")
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return " ".join([digest.hexdigest()[:12], *(f"{name} {found[name]}" for name in names if name in found)])


def _digest(config, topology: str) -> str:
    described = model_folder(config.model.path) / "config.json"
    model = described.read_text() if described.exists() else str(described)
    text = "\n".join([configs.to_json(config), topology, version(), model])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
