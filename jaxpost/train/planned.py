"""A run without weights, data and devices: what `jaxpost plan` compiles.

Its stage is gone through as ever, under `over(devices)`: the mesh is made of these devices, be they here or only
described; weights are shapes in their shards; data are placeholders of the right kind; and where training would begin
the loop hands over its programs (`finish`) instead. So whatever a stage computes is planned, and a new one needs
nothing for it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpost.data.rows import build_batch
from jaxpost.sharding import batch_sharding
from jaxpost.types import Batch, Document, Origin

_CURRENT: contextvars.ContextVar["Plan | None"] = contextvars.ContextVar("planned", default=None)
RANKED = 2  # completions of a ranking, where batch.completions does not say: pairs


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run.

    fn: jitted; args: its arguments, ShapeDtypeStructs with shardings. ledger: {what: tree} of these arguments, by what
    they are for. calls: of it in a step of the run, at most. policy: the model that it runs, its words or scores read.
    rows: [B, T] of one forward pass, over all devices. passes: over such rows in a call, a backward pass counted twice.
    trained: the parameters that it computes gradients of; None where it computes none. trunks: models that a backward
    pass goes through. microbatches: whose gradients are added up.
    """

    name: str
    fn: Callable
    args: tuple
    ledger: dict[str, Any]
    calls: float
    policy: Any
    rows: tuple[int, int]
    passes: float
    trained: Any = None
    trunks: int = 1
    microbatches: int = 1


@dataclasses.dataclass
class Plan:
    """What is planned; the stage fills in mesh and programs."""

    devices: Sequence
    mesh: Any = None
    programs: list[Program] = dataclasses.field(default_factory=list)


class _Finished(BaseException):
    """Ends a stage that is planned."""


def current() -> Plan | None:
    """What is planned now; None in a run."""
    return _CURRENT.get()


@contextlib.contextmanager
def over(devices: Sequence):
    """Goes through stages without running them; yields the Plan that they fill."""
    plan = Plan(devices)
    token = _CURRENT.set(plan)
    try:
        yield plan
    finally:
        _CURRENT.reset(token)


def gone_through(stage: Callable, config, devices: Sequence) -> Plan:
    """The programs of a stage with this config over these devices."""
    with over(devices) as plan, contextlib.suppress(_Finished):
        stage(config)
    return plan


def finish(*programs: Program):
    """Hands over the programs of the stage, and ends it."""
    current().programs += programs
    raise _Finished


@dataclasses.dataclass(frozen=True)
class Words:
    """In place of a tokenizer."""

    stop_ids: tuple[int, ...]
    fingerprint: str = "planned"

    def decode(self, ids: list[int]) -> str:
        """Of nothing that is drawn: a plan draws nothing."""
        return ""


def documents(kind: str, most: int | None) -> tuple[list[Document], int]:
    """(placeholders of a kind of data, completions of each): they carry what real ones do, in two tokens each."""
    part, here = (np.zeros(2, np.int32), np.ones(2, np.float32)), Origin("planned", 1)
    if kind in ("sft", "stepwise"):
        steps = {name: (np.zeros(2, np.float32),) for name in ("step", "label")} if kind == "stepwise" else {}
        return [Document(np.zeros(0, np.int32), (part[0],), (part[1],), 0, here, token=steps)], 0
    count = {"preference": 2, "scored": 2, "unpaired": 1}.get(kind) or most or RANKED
    found = Document(part[0], (part[0],) * count, (part[1],) * count, 0, here)
    if kind == "unpaired":
        return [dataclasses.replace(found, completion={"label": (float(good),)}) for good in (True, False)], count
    return [dataclasses.replace(found, completion={"score": (0.0,) * count} if kind == "scored" else {})], count


def of_state(state) -> dict:
    """{what: tree} of an abstract TrainState."""
    return {"parameters": state.params, "moments": state.opt_state, "carry": (state.step, state.key, state.carry)}


def batch_of(config, mesh, examples: Sequence[Document], branches: int) -> Batch:
    """A step's Batch as ShapeDtypeStructs in their shards."""
    names = ("rows_per_step", "tokens_per_row", "documents_per_row")
    shape = {name: getattr(config.batch, name) for name in names}
    return as_shapes(build_batch([[examples[0]]], **shape, branches=branches), mesh)


def as_shapes(batch, mesh):
    """numpy arrays as ShapeDtypeStructs, their first dimension over the axes of rows."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), batch)
