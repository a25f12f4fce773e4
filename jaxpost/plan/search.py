"""The settings of a config that do not change what is learnt, tried on a topology: mesh, remat, accumulation.

All are counted (plan/ledger.py), which takes a moment each; the most promising are compiled.
"""

import dataclasses
import itertools

from jaxpost.errors import ConfigError
from jaxpost.plan import chips, planner
from jaxpost.plan.planner import TopologyPlan

REMAT = ("none", "dots_no_batch", "full")
MARGIN = 1.05  # of the memory that is counted, before the compiler has its say


def candidates(config, topology: str) -> list:
    """Configs with other meshes, remat policies and microbatches, that are valid; the run's own among them."""
    _, devices = chips.describe(topology)
    devices *= max(config.mesh.slices, 1)
    rows = config.batch.rows_per_step
    powers = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    found = []
    for tensor, context, accumulate, remat in itertools.product(powers, powers, powers, REMAT):
        rest = devices // max(config.mesh.slices, 1)
        if rest % (tensor * context) or rows % accumulate or tensor > 8 or context > 8:
            continue
        expert = max(config.mesh.expert, 1)
        fsdp = rest // (tensor * context * expert)
        mesh = dataclasses.replace(config.mesh, data=1, fsdp=fsdp, tensor=tensor, context=context)
        shards = max(config.mesh.slices, 1) * fsdp * expert
        if fsdp < 1 or rows // accumulate % shards or config.batch.tokens_per_row % (128 * context):
            continue
        batch = dataclasses.replace(config.batch, accumulate=accumulate)
        policy = dataclasses.replace(config.remat, policy=remat)
        found.append(dataclasses.replace(config, mesh=mesh, batch=batch, remat=policy))
    return found


def search(config, topology: str, *, best: int, cache: bool = True, console=None) -> list[TopologyPlan]:
    """The plans of the `best` candidates that are counted to fit, quickest first, compiled.

    Raises ConfigError where none fits by the count.
    """
    counted = []
    for candidate in candidates(config, topology):
        try:
            found = planner.estimate(candidate, topology)
        except ConfigError:  # a dimension of the model that does not divide by the mesh
            continue
        counted.append((found, candidate))
    fitting = [(found, candidate) for found, candidate in counted if found.peak * MARGIN <= found.usable]
    if not fitting:
        least = min((found.peak for found, _ in counted), default=0) / planner.GIB
        raise ConfigError(f"topology {topology}: of {len(counted)} settings none fits; the least needs {least:.2f} GiB")
    fitting.sort(key=lambda pair: pair[0].seconds)
    plans = []
    for _, candidate in fitting[:best]:
        plans.append(planner.plan(candidate, topology, cache=cache))
        if console is not None:
            console.print(line(candidate, plans[-1]), highlight=False, soft_wrap=True)
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds))


def line(config, found: TopologyPlan) -> str:
    """One candidate: the keys to set, and what it needs."""
    sizes = " ".join(f"--config.mesh.{name}={size}" for name, size in found.mesh.items())
    keys = f"{sizes} --config.batch.accumulate={config.batch.accumulate} --config.remat.policy={config.remat.policy}"
    verdict = "fits" if found.fits else "does not fit"
    return f"{found.seconds:.3g} s a step, {found.peak / planner.GIB:.2f} GiB, {verdict}: {keys}"
