"""A plan as tables for people."""

from rich.console import Console
from rich.table import Table

from jaxpost.plan.planner import GIB, ProgramPlan, TopologyPlan

LEAST = GIB // 200  # bytes: less is shown as 0.00


def show(found: TopologyPlan, title: str, console: Console) -> None:
    """Memory, work and time of every program; the last two lines are the peak, and whether it fits."""
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1) or "1"
    how = "an estimate from shapes" if found.estimated else "compiled"
    head = f"{found.topology}: {found.devices} devices ({mesh}), {title}; {how}"
    console.print(head, style="bold", highlight=False, soft_wrap=True)
    console.print(_memory(found))
    console.print(_work(found))
    if any(program.collectives for program in found.programs):
        console.print(_wires(found))
    for line in _step(found):
        console.print(line, highlight=False, soft_wrap=True)
    for program in found.programs:
        if program.failure:
            console.print(f"{program.name}: {program.failure}", highlight=False, soft_wrap=True)
    console.print(f"peak {found.peak / GIB:.2f} GiB of {found.usable / GIB:.2f} GiB a device", highlight=False)
    console.print("fits" if found.fits else "does not fit", style="bold green" if found.fits else "bold red")


def _table(title: str, found: TopologyPlan) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for program in found.programs:
        table.add_column(program.name, justify="right")
    return table


def _memory(found: TopologyPlan) -> Table:
    table = _table("memory, GiB a device", found)
    shown = [name for program in found.programs for name, size in program.ledger.items() if size >= LEAST]
    names = list(dict.fromkeys(shown))
    gib = lambda size: "" if not size else f"{size / GIB:.2f}"  # noqa: E731
    for name in names:
        table.add_row(name, *(gib(program.ledger.get(name)) for program in found.programs))
    table.add_row("counted", *(gib(program.counted) for program in found.programs), end_section=not found.estimated)
    if not found.estimated:
        table.add_row("compiler's peak", *(gib(program.peak) for program in found.programs))
        table.add_row("of it arguments", *(gib(program.arguments) for program in found.programs), end_section=True)
    if any(program.elsewhere for program in found.programs):
        table.add_row("beside it, of the run", *(gib(program.elsewhere) for program in found.programs))
    if any(program.host for program in found.programs):
        table.add_row("in the host's memory", *(gib(program.host) for program in found.programs))
    table.add_row("head-room", *(f"{(found.usable - program.needs) / GIB:.2f}" for program in found.programs))
    return table


def _work(found: TopologyPlan) -> Table:
    table = _table("a call, on each device", found)
    row = lambda name, show: table.add_row(name, *(show(program) for program in found.programs))  # noqa: E731
    row("calls in a step", lambda p: f"{p.calls:g}")
    row("TFLOP", lambda p: f"{p.flops / 1e12:.4g}")
    row("bytes of its memory, GB", lambda p: f"{p.hbm_bytes / 1e9:.4g}")
    limits = [name for program in found.programs for name, seconds in program.roofline.items() if seconds]
    for name in dict.fromkeys(limits):
        row(f"at least, by {name}, s", lambda p, name=name: f"{p.roofline.get(name, 0):.4g}")
    row("bound by", lambda p: p.bound)
    if not found.estimated:
        row("compiled in, s", lambda p: "" if p.compile_seconds is None else f"{p.compile_seconds:.0f}")
    return table


def _wires(found: TopologyPlan) -> Table:
    table = _table("received by each device, GB", found)
    for name in dict.fromkeys(name for program in found.programs for name in program.collectives):
        table.add_row(name, *(_gb(program, name) for program in found.programs))
    return table


def _gb(program: ProgramPlan, name: str) -> str:
    size = program.collectives.get(name)
    return "" if size is None else f"{size / 1e9:.4g}"


def _step(found: TopologyPlan) -> list[str]:
    lines = [
        f"a step: at least {found.seconds:.3g} s for {found.tokens:,} tokens; "
        f"at most {found.tokens_per_second:,.0f} tokens/s and {100 * found.mfu:.0f} % of the chips' peak"
    ]
    if found.cost_per_step is not None:
        lines.append(
            f"at least {found.cost_per_step:.4g} a step, {found.cost_per_billion_tokens:,.0f} a billion tokens, "
            "at plan.price_per_chip_hour"
        )
    return lines
