"""What a run says at its start and at its end: derived quantities, evaluation before and after."""

import collections
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from jaxpost.data.loader import row_statistics
from jaxpost.data.preflight.measure import Lengths, measure
from jaxpost.data.preflight.plot import write_histograms
from jaxpost.errors import UserError
from jaxpost.train.progress import print_before_after, print_table

GIB = 2**30
PICTURE = "lengths.png"
MOST_DRAWN = 1000  # documents of a run, at even distances; `jaxpost check` draws all


def start_table(config, folder, mesh, model, data, abstract, loader, total: int, start: int) -> None:
    """One table of derived quantities: nothing here is set by a key, all of it follows from them."""
    print_table("data", data.report.rows())
    batch, statistics = config.batch, row_statistics(loader)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract.params))
    beneath = []
    if model.base is not None:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.load_frozen()))
        kind = "" if model.base.quantized == "none" else f", {model.base.quantized}"
        beneath = [("weights beneath the adapters", f"{held / GIB:.3f} GiB{kind}")]
    rows = [
        ("parameters that train", parameters),
        *beneath,
        ("devices", " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1"),
        ("compute type", model.policy.compute_dtype),
        ("state (weights, moments)", f"{state_bytes(abstract) / GIB:.3f} GiB"),
        ("training examples", len(data.train)),
        ("evaluation examples", len(data.eval) if data.eval is not None else 0),
        ("steps", total if not start else f"{start} done of {total:,}"),
        ("token places a step", batch.rows_per_step * batch.tokens_per_row),
        ("padding", f"{100 * statistics['padding_share']:.1f} %"),
        ("documents a row", f"{statistics['documents_per_row']:.1f}"),
        lengths_row(config, model, data.train, folder),
    ]
    if data.branches:
        rows.append(("prompt tokens saved by sharing", f"{100 * statistics['prompt_share_saved']:.1f} %"))
    print_table(f"{config.stage}: {config.model.path}", rows)


def draw_lengths(config, model, lengths: Lengths, folder, note: str = "") -> epath.Path:
    """The histograms of the lengths beside the limits of the config, in the folder. Raises UserError."""
    path = epath.Path(folder) / PICTURE
    most = config.data.max_tokens or model.policy.config.max_positions
    limits = {"data.max_tokens": most, "batch.tokens_per_row": config.batch.tokens_per_row}
    title = ", ".join(location.rpartition("/")[2] for location, _ in config.data.train)
    write_histograms(lengths, path, title + note, limits)
    return path


def lengths_row(config, model, documents, folder) -> tuple[str, str]:
    """A row of the start table: the picture of the lengths of some documents, or what it needs."""
    sample = documents.sample(MOST_DRAWN) if jax.process_index() == 0 else []
    if not sample:
        return "lengths", "not drawn"
    try:
        note = f" ({len(sample):,} documents looked at)"
        return "lengths", draw_lengths(config, model, measure(sample), folder, note).name
    except UserError:
        return "lengths", "not drawn: pip install 'jaxpost[plot]'"


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


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """{path: its file's name, or itself where two have the same}."""
    names = {path: path.rstrip("/").rpartition("/")[2] for path in paths}
    counts = collections.Counter(names.values())
    return {path: name if counts[name] == 1 else path for path, name in names.items()}


def number(metrics: dict[str, float], name: str) -> str:
    """A metric's value, with its 95 % interval where there is one; "-" where it has none."""
    if name not in metrics:
        return "-"
    text = f"{metrics[name]:.4f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
    return text
