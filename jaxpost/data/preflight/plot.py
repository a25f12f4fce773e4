"""The picture of the lengths. Needs matplotlib (extra `plot`), which is imported here and nowhere else."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from etils import epath

from jaxpost.data.preflight.measure import Lengths
from jaxpost.errors import UserError

BINS = 60


def write_histograms(lengths: Lengths, path, title: str, limits: Mapping[str, int]) -> None:
    """One histogram a series of `lengths` as a PNG, with the limits (name: tokens) as lines.

    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no state
    except ImportError:
        raise UserError("a picture of the lengths needs matplotlib: pip install 'jaxpost[plot]'") from None

    series = {field.name: getattr(lengths, field.name) for field in dataclasses.fields(lengths)}
    figure = Figure(figsize=(8, 7), layout="constrained")
    figure.suptitle(title)
    longest = max(int(lengths.whole.max()), 1)
    edges = np.linspace(0, longest + 1, min(BINS, longest + 1) + 1)
    for axes, (name, values) in zip(figure.subplots(len(series), 1, sharex=True), series.items(), strict=True):
        axes.hist(values, bins=edges, color="tab:blue")
        middle, most = np.percentile(values, (50, 99), method="higher").tolist()
        axes.axvline(middle, color="black", linewidth=1, label=f"median {middle:,}")
        axes.axvline(most, color="black", linewidth=1, linestyle="--", label=f"99 % {most:,}")
        for color, (limit, tokens) in zip(("tab:red", "tab:orange"), limits.items(), strict=False):
            if tokens <= 2 * longest:  # a limit far away would squeeze what is to be seen
                axes.axvline(tokens, color=color, linewidth=1, label=f"{limit} {tokens:,}")
        axes.set_ylabel(f"{name}: sequences")
        axes.legend(fontsize="small", loc="upper right")  # "best" looks for a place, and warns where that takes long
    axes.set_xlabel("tokens")
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
