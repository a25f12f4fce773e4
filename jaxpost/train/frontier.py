"""The picture of a run that learns from a reward: what the reward and the gold score are at which KL."""

import logging
from collections.abc import Mapping, Sequence

from jaxpost.data import pictures
from jaxpost.errors import UserError

log = logging.getLogger("jaxpost")

NAME = "frontier.png"  # in a run folder
COLUMNS = 3  # of small panels


def write_frontier(
    folder,
    rows: Sequence[Mapping[str, float]],
    *,
    kl: str,
    reward: str,
    gold: str | None = None,
    signs: Sequence[str] = (),
    alarms: Mapping[int, str] | None = None,
) -> None:
    """frontier.png in a run folder: reward and gold score over the KL, coloured by step, as Gao et al. 2022 draw them.

    Below it every one of `signs` (length, repetition, ...) that the rows have, over the steps. All are names of
    metrics, rows those of metrics.jsonl. alarms: {step: what to write beside a line there}. Without matplotlib, and
    before the first row that has KL and reward, there is no picture; the log says so.

    "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760, figure 1.
    """
    steps = by_step(rows)
    signs = [name for name in signs if series(steps, "step", name)]
    if not series(steps, kl, reward):
        log.warning("no %s: no row has both %s and %s", folder / NAME, kl, reward)
        return
    high = -(-len(signs) // COLUMNS)
    try:
        figure = pictures.new_figure(str(folder / NAME), figsize=(10, 5 + 2 * high))
    except UserError as error:
        log.warning("%s", error)
        return
    grid = figure.add_gridspec(1 + high, COLUMNS, height_ratios=[2.5] + [1] * high)
    draw_frontier(figure, figure.add_subplot(grid[0, :]), steps, kl, reward, gold)
    for place, name in enumerate(signs):
        axes = figure.add_subplot(grid[1 + place // COLUMNS, place % COLUMNS])
        axes.plot(*series(steps, "step", name), color="tab:blue", linewidth=1)
        axes.set_title(name, fontsize="small")
        for step, text in (alarms or {}).items():
            axes.axvline(step, color="tab:red", linewidth=1, linestyle="--", label=text)
    if alarms and signs:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    pictures.save(figure, folder / NAME)


def draw_frontier(figure, axes, steps, kl: str, reward: str, gold: str | None) -> None:
    """Both scores over the KL, each with its own axis: their units have nothing to do with each other."""
    last = max(row["step"] for row in steps)
    drawn = [(axes, reward, "o", "tab:blue")]
    if gold is not None and series(steps, kl, gold):
        drawn.append((axes.twinx(), gold, "^", "tab:orange"))
    for place, name, marker, color in drawn:
        found = series(steps, kl, name, "step")
        place.plot(*found[:2], color=color, linewidth=1, alpha=0.5)
        dots = place.scatter(*found[:2], c=found[2], marker=marker, s=16, vmin=0, vmax=last, label=name)
        place.set_ylabel(f"{name} ({'triangles' if marker == '^' else 'dots'})", color=color)
    axes.set_xlabel(kl)
    figure.colorbar(dots, ax=axes, label="step", location="top", aspect=60)


def by_step(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """One row a step, of training and evaluation together."""
    joined = {}
    for row in rows:
        joined.setdefault(row["step"], {}).update(row)
    return list(joined.values())


def series(steps: Sequence[Mapping[str, float]], *names: str) -> list[list[float]]:
    """The values of each metric, from the steps that have all of them; empty where none has."""
    return [
        list(values)
        for values in zip(
            *([row[name] for name in names] for row in steps if all(name in row for name in names)), strict=True
        )
    ]
