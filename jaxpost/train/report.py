"""What a run says at its start and at its end: derived quantities, evaluation before and after."""

import jax
import numpy as np

from jaxpost.data.loader import row_statistics
from jaxpost.train.progress import print_before_after, print_table

GIB = 2**30


def start_table(config, mesh, model, data, abstract, loader, total: int, start: int) -> None:
    """One table of derived quantities: nothing here is set by a key, all of it follows from them."""
    print_table("data", data.report.rows())
    batch, statistics = config.batch, row_statistics(loader)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract.params))
    rows = [
        ("parameters", parameters),
        ("devices", " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1"),
        ("compute type", model.policy.compute_dtype),
        ("state (weights, moments)", f"{state_bytes(abstract) / GIB:.3f} GiB"),
        ("training examples", len(data.train)),
        ("evaluation examples", len(data.eval) if data.eval is not None else 0),
        ("steps", total if not start else f"{start} done of {total:,}"),
        ("token places a step", batch.rows_per_step * batch.tokens_per_row),
        ("padding", f"{100 * statistics['padding_share']:.1f} %"),
        ("documents a row", f"{statistics['documents_per_row']:.1f}"),
    ]
    if data.branches:
        rows.append(("prompt tokens saved by sharing", f"{100 * statistics['prompt_share_saved']:.1f} %"))
    print_table(f"{config.stage}: {config.model.path}", rows)


def state_bytes(abstract) -> int:
    """Bytes of parameters and optimizer state over all devices."""
    leaves = jax.tree.leaves((abstract.params, abstract.opt_state))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def end_tables(before, after) -> None:
    """Evaluation metrics before and after, then the sample completions."""
    names = [name for name in after.metrics if not name.endswith(("_low", "_high"))]
    rows = [(name, f"{number(before.metrics, name)} -> {number(after.metrics, name)}") for name in names]
    if rows:
        print_table("evaluation, before -> after", rows)
    if after.samples:
        prompts, completions = zip(*after.samples, strict=True)
        print_before_after(prompts, [text for _, text in before.samples], completions)


def data_table(data, loop) -> None:
    """What the run made of its data: passes over it, time waited for it, and what was dropped where that shows late."""
    rows = [(name.removeprefix("data/"), f"{value:.2f}") for name, value in loop.epochs.items()]
    rows.append(("time waited for data, first step left out", f"{100 * loop.wait_share(1):.2f} %"))
    print_table("data", [*(data.report.rows() if data.report.lazy else ()), *rows])


def number(metrics: dict[str, float], name: str) -> str:
    """A metric's value, with its 95 % interval where there is one."""
    text = f"{metrics[name]:.4f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
    return text
