"""The picture of KL against reward and gold."""

import sys

import numpy as np
import pytest
from etils import epath

from jaxpost.train import frontier

NAMES = {"kl": "kl", "reward": "reward"}


@pytest.fixture
def rows():
    """Training rows, and the gold score in evaluation rows of their own."""
    found = []
    for step in range(1, 31):
        found.append({"step": step, "kl": 0.02 * step, "reward": np.sqrt(step), "length": 9.0, "no_eos": 0.1})
        if step % 10 == 0:
            found.append({"step": step, "eval/gold": step * (40 - step)})
    return found


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_what_is_given_is_drawn(rows, tmp_path):
    """Gold, small panels and alarms each change the picture; panels make it higher."""
    sizes = []
    for given in ({}, {"gold": "eval/gold"}, {"signs": ["length", "spread", "no_eos"]}):
        frontier.write_frontier(epath.Path(tmp_path), rows, **NAMES, **given)
        sizes.append(pixels(tmp_path / frontier.NAME))
    plain, gold, signs = sizes
    assert plain.shape == gold.shape and (plain != gold).any()
    assert signs.shape[0] > plain.shape[0]
    frontier.write_frontier(epath.Path(tmp_path), rows, **NAMES, signs=["length", "no_eos"], alarms={20: "kl > 0.3"})
    assert (pixels(tmp_path / frontier.NAME) != signs).any()


def test_series_are_of_the_steps_that_have_all(rows):
    steps = frontier.by_step(rows)
    assert len(steps) == 30
    assert frontier.series(steps, "step", "eval/gold") == [[10, 20, 30], [300, 400, 300]]
    assert frontier.series(steps, "kl", "spread") == []


@pytest.mark.filterwarnings("error")
def test_a_single_row_and_constant_values_draw_without_warning(tmp_path):
    frontier.write_frontier(epath.Path(tmp_path), [{"step": 1, "kl": 0.0, "reward": 1.0}], **NAMES, signs=["kl"])
    assert (tmp_path / frontier.NAME).exists()


def test_what_cannot_be_drawn_is_said(rows, tmp_path, monkeypatch, caplog):
    frontier.write_frontier(epath.Path(tmp_path), rows, kl="kl", reward="rewards")
    assert "no row has both kl and rewards" in caplog.text
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    frontier.write_frontier(epath.Path(tmp_path), rows, **NAMES)
    assert "frontier.png needs matplotlib: pip install 'jaxpost[plot]'" in caplog.text
    assert not list(tmp_path.iterdir())
