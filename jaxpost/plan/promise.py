"""A run on hardware beside its plan: what was counted before the first step, and what was measured after the last."""

import logging
import statistics

import jax

from jaxpost.errors import UserError
from jaxpost.plan import chips, planner
from jaxpost.plan.planner import GIB, TopologyPlan
from jaxpost.train.progress import print_table

log = logging.getLogger("jaxpost")
# jax's names of devices, as they begin, and the chips' (plan/chips.py).
KINDS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100": "a100-80"},
    **{"NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200"},
}


def chip_of(device) -> chips.Chip | None:
    """The chip of a device that is here; None for one that no figures are known of, a CPU among them."""
    names = [name for name in KINDS if device.device_kind.startswith(name)]
    return chips.CHIPS[KINDS[max(names, key=len)]] if names else None


def promise(config) -> TopologyPlan | None:
    """What is counted of a run on the devices at hand, printed; None where their chip is not known."""
    devices = jax.devices()
    chip = chip_of(devices[0])
    if chip is None:
        return None
    name = f"{chip.name}, {len(devices)} devices"
    try:
        found = planner.planned_on(planner.as_planned(config), name, chip, devices, _sides(devices), compiled=False)
    except UserError:
        raise
    except Exception as error:  # of a model that cannot be counted, say: the run itself may well go on
        log.warning("no plan of this run: %r", error)
        return None
    rows = [(what, f"{size / GIB:.2f} GiB") for what, size in found.programs[0].ledger.items() if size >= GIB / 200]
    rows.append(("peak a device, counted", f"{found.peak / GIB:.2f} of {found.usable / GIB:.2f} GiB"))
    rows.append(("tokens/s, at most", f"{found.tokens_per_second:,.0f}"))
    if jax.process_index() == 0:
        print_table(f"plan: {name}", rows)
    return found


def compare(found: TopologyPlan | None, run) -> None:
    """Prints what was measured of a Run beside what `promise` found; nothing where that is None."""
    if found is None or jax.process_index():
        return
    stats = jax.local_devices()[0].memory_stats() or {}
    peak, rows = stats.get("peak_bytes_in_use"), []
    if peak:
        rows.append(("peak a device", f"{found.peak / GIB:.2f} -> {peak / GIB:.2f} GiB"))
    speeds = [row["tokens_per_second"] for row in run.rows if "tokens_per_second" in row]
    if speeds:
        rows.append(("tokens/s", f"at most {found.tokens_per_second:,.0f} -> {statistics.median(speeds):,.0f}"))
    print_table("plan -> measured", rows)


def _sides(devices) -> tuple[int, ...]:
    """Sides of the torus that the devices of a slice lie in; their number where they have no coordinates."""
    places = [getattr(device, "coords", None) for device in devices]
    if None in places:
        return (len(devices),)
    return tuple(len(set(axis)) for axis in zip(*places, strict=True))
