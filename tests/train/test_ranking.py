"""What is said of a reward model on held-out rankings, against loops and hand arithmetic."""

import builtins
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from jaxpost.train import ranking
from jaxpost.train.evaluation import wilson_interval
from jaxpost.train.report import short_names
from jaxpost.types import Document, Origin

RNG = np.random.default_rng(0)


def document(scores, lengths, path="a/pairs.jsonl"):
    parts = tuple(np.zeros(length, np.int32) for length in lengths)
    return Document(np.zeros(2, np.int32), parts, (), 0, Origin(path, 1), completion={"score": tuple(scores)})


@pytest.fixture(scope="module")
def given():
    """(documents of 2 to 4 completions from two files, scores f32[documents, 4] with NaN where there is none)"""
    documents, rows = [], []
    for n in range(60):
        size = 2 + n % 3
        given = sorted(RNG.integers(0, 3, size).astype(float).tolist(), reverse=True)
        given[0] += 1
        documents.append(document(given, RNG.integers(1, 30, size), f"{'ab'[n % 2]}/pairs.jsonl"))
        rows.append([*RNG.normal(size=size), *[np.nan] * (4 - size)])
    return documents, np.array(rows, np.float32)


def test_accuracy_counts_every_pair_that_the_data_tell_apart(given):
    documents, scores = given
    right, rankings = [], set()
    for index, one in enumerate(documents):
        values = one.completion["score"]
        for i in range(len(values)):
            for j in range(len(values)):
                if values[i] > values[j]:
                    right.append(scores[index, i] > scores[index, j])
                    rankings.add(index)
    found = ranking.report(documents, scores)
    low, high = wilson_interval(np.mean(right), len(rankings))
    expected = {"value": np.mean(right), "low": low, "high": high, "pairs": len(right), "rankings": len(rankings)}
    assert found["accuracy"] == pytest.approx(expected)
    # the parts make the whole: by file, by the data's margin, by the model's
    for parts in (found["by_source"].values(), found["by_distance"], found["calibration"]):
        assert sum(part["pairs"] for part in parts) == len(right)
        assert sum(part["pairs"] * part["value"] for part in parts) == pytest.approx(np.sum(right))
    assert list(found["by_source"]) == ["a/pairs.jsonl", "b/pairs.jsonl"]  # names alike: told apart by their paths
    json.dumps(found)


def test_a_tie_of_two_scores_is_wrong():
    found = ranking.report([document((1, 0), (3, 4))], np.array([[0.5, 0.5]]))
    assert found["accuracy"]["value"] == 0 and found["length_correlation"] is None


def test_margins_of_the_data_are_told_apart():
    documents = [document((1 + n % 2, 0), (3, 4)) for n in range(8)]
    scores = np.array([[1.0, 0.0] if n % 2 else [0.0, 1.0] for n in range(8)])
    found = ranking.report(documents, scores)["by_distance"]
    assert [(bin["from"], bin["value"], bin["pairs"]) for bin in found] == [(1.0, 0.0, 4), (2.0, 1.0, 4)]
    documents = [document((float(n), 0), (3, 4)) for n in range(1, 41)]
    found = ranking.report(documents, np.tile([1.0, 0.0], (40, 1)))["by_distance"]
    assert [bin["pairs"] for bin in found] == [8] * 5 and found[0]["from"] == 1 and found[-1]["to"] == 40


def test_a_calibrated_model_has_a_small_error_and_a_boastful_one_a_large():
    margins = np.abs(RNG.normal(0, 2, 4000))
    right = RNG.random(4000) < 1 / (1 + np.exp(-margins))
    scores = np.where(right, margins, -margins)[:, None] * [1, 0]
    documents = [document((1, 0), (3, 4))] * 4000
    found = ranking.report(documents, scores)
    assert found["calibration_error"] < 0.03 and len(found["calibration"]) == ranking.BINS
    middle = found["calibration"][5]
    assert middle["predicted"] == pytest.approx(np.mean(1 / (1 + np.exp(-np.sort(margins)[2000:2400]))))
    assert ranking.report(documents, 10 * scores)["calibration_error"] > 0.1


def test_length_bias_is_pearsons_correlation(given):
    documents, scores = given
    lengths = [len(part) for one in documents for part in one.completions]
    values = [scores[n, k] for n, one in enumerate(documents) for k in range(len(one.completions))]
    found = ranking.report(documents, scores)["length_correlation"]
    assert found["value"] == pytest.approx(np.corrcoef(lengths, values)[0, 1])
    # Fisher's interval by hand for r = 0.5 of 28 observations: atanh(0.5) -+ 1.96 / 5
    x = np.array([1.0, 0.0, -1.0, 0.0])
    y = x * 0.5 + np.array([0.0, 1.0, 0.0, -1.0]) * np.sqrt(0.75)
    by_hand = ranking.length_correlation(x, y, rankings=28)
    np.testing.assert_allclose(
        [by_hand["low"], by_hand["high"]], np.tanh(np.arctanh(0.5) + np.array([-0.392, 0.392])), 1e-3
    )


def test_metrics_name_sources_where_there_are_several(given):
    metrics = ranking.flat(ranking.report(*given))
    assert {"accuracy_low", "calibration_error", "length_correlation", "accuracy/a/pairs.jsonl_high"} <= set(metrics)
    one = ranking.flat(ranking.report(given[0][::2], given[1][::2]))
    assert not any("pairs.jsonl" in name for name in one)
    assert short_names(["x/a", "y/b"]) == {"x/a": "a", "y/b": "b"}


def test_the_report_is_written_and_drawn(given, tmp_path):
    ranking.write_report(epath.Path(tmp_path), *given)
    assert json.loads((tmp_path / "reward.json").read_text()) == ranking.report(*given)
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_what_the_picture_needs(given, tmp_path, monkeypatch, caplog):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    ranking.write_report(epath.Path(tmp_path), *given)
    assert "pip install 'jaxpost[plot]'" in caplog.text
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == ["reward.json"]
