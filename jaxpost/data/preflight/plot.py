"""The picture of the lengths."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxpost.data import pictures
from jaxpost.data.preflight.measure import Lengths

BINS = 60


def write_histograms(lengths: Lengths, path, title: str, limits: Mapping[str, int]) -> None:
    """One histogram a series of `lengths` as a PNG, with the limits (name: tokens) as lines.

    Raises UserError where matplotlib is not installed.
    """
    figure = pictures.new_figure("a picture of the lengths", figsize=(8, 7))
    series = {field.name: getattr(lengths, field.name) for field in dataclasses.fields(lengths)}
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
    pictures.save(figure, path)
