"""The data of whole runs: tokenised ahead or as the run goes, waited for, counted by source, and traced back."""

import json
import re

import jax
import numpy as np
import pytest

import jaxpost
from jaxpost import cli
from jaxpost import config as configs
from jaxpost.data import dataset, loader
from jaxpost.data.documents import LazyDocuments
from jaxpost.errors import ConfigError, DataError
from jaxpost.train.loop import epoch_metrics
from jaxpost.train.setup import open_data, open_model, train_loader
from tests.train.test_runs import same_bits, same_rows
from tests.worlds import crash_after, write_model

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_answers(path, count, first=0):
    """Conversations about numbers; every ninth has an empty answer."""
    lines = []
    for n in range(first, first + count):
        answer = "" if n % 9 == 4 else "It is written " + " ".join(NUMBERS[int(digit)] for digit in str(n)) + "."
        turns = [{"role": "user", "content": f"How is {n} written?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    files = [write_answers(folder / "a.jsonl", 40), write_answers(folder / "b.jsonl", 30, first=500)]
    return write_model(folder / "model"), files


def sft_config(given, run_dir, **data):
    model, (first, second) = given
    data = {"train": [[str(first), 2.0], str(second)], "eval_examples": 8, "max_dropped": 0.5, **data}
    return {
        "stage": "sft",
        "model": {"path": str(model)},
        "data": data,
        "batch": {"rows_per_step": 8, "tokens_per_row": 64, "documents_per_row": 2},
        "optimizer": {"learning_rate": 1e-3},
        "run": {"dir": str(run_dir), "steps": 12, "eval_prompts": 0, "log_to": (), "export": False},
    }


@pytest.fixture(scope="module")
def small_windows():
    """Ten windows an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader.Loader.__init__, "__kwdefaults__", loader.Loader.__init__.__kwdefaults__ | {"window": 10})
        yield


@pytest.fixture(scope="module")
def whole(given, small_windows, tmp_path_factory):
    """Tokenised ahead, never stopped."""
    return jaxpost.run(sft_config(given, tmp_path_factory.mktemp("whole") / "run"))


def test_a_lazy_run_is_the_same_to_the_bit_stopped_or_not(given, whole, tmp_path, monkeypatch, capsys):
    config = sft_config(given, tmp_path / "run", tokenize="lazy", workers=0)
    config["run"]["checkpoint_every"] = 3
    with crash_after(7):
        jaxpost.run(config)
    config["run"]["resume"] = True
    resumed = jaxpost.run(config)
    same_rows(resumed.rows, whole.rows)
    same_bits(resumed.params, whole.params)
    assert "examples read so far" in capsys.readouterr().out
    asked, members = [], LazyDocuments.members
    monkeypatch.setattr(LazyDocuments, "members", lambda self, entries: asked.append(1) or members(self, entries))
    expected = provenance(capsys, f"--run={whole.folder}", "--step=12")
    assert provenance(capsys, f"--run={tmp_path / 'run'}", "--step=12") == expected
    assert len(asked) <= 4  # the checkpoint says where the windows lie: those before are not tokenised again


def test_a_lazy_run_that_resumes_does_not_read_what_it_has_seen(given, tmp_path, monkeypatch):
    config = sft_config(given, tmp_path / "run", tokenize="lazy", workers=0, eval_examples=0)
    monkeypatch.setattr(dataset, "PIECE", 10)
    resolved = configs.resolve(config)
    model = open_model(resolved, mesh=None)
    first = train_loader(resolved, open_data(resolved, model, "sft"))
    batch = first.batch(9)
    data = open_data(resolved, model, "sft")
    asked, encode = [], data.train._encode
    monkeypatch.setattr(data.train, "_encode", lambda ids: asked.append(ids) or encode(ids))
    again = train_loader(resolved, data, first.plan())
    jax.tree.map(np.testing.assert_array_equal, again.batch(9), batch)
    assert len(asked) <= 4 < first.place(9).window + 10 * first.place(9).epoch


def test_epochs_and_waiting_are_logged(given, whole, capsys):
    last = [row for row in whole.rows if "loss" in row][-1]
    assert 0 <= last["data_wait_share"] <= 1
    # 110 entries less those of the 8 held-out examples; a is passed over twice an epoch.
    assert {"epoch", "data/epoch/a.jsonl", "data/epoch/b.jsonl"} <= set(last)
    np.testing.assert_allclose(last["data/epoch/a.jsonl"] / last["epoch"], 2, rtol=0.2)
    np.testing.assert_allclose(last["data/epoch/b.jsonl"] / last["epoch"], 1, rtol=0.3)
    epochs = [row["epoch"] for row in whole.rows if "loss" in row]
    assert epochs == sorted(epochs) and epochs[0] > 0


def test_sources_of_one_name_are_told_apart_by_path():
    assert epoch_metrics({"": 0.5, "x/a.jsonl": 1.0}) == {"epoch": 0.5}
    found = epoch_metrics({"": 0.5, "x/a.jsonl": 1.0, "y/a.jsonl": 2.0, "x/b.jsonl": 3.0})
    assert found == {
        "epoch": 0.5, "data/epoch/x/a.jsonl": 1.0, "data/epoch/y/a.jsonl": 2.0, "data/epoch/b.jsonl": 3.0,
    }  # fmt: skip


# ---- provenance ----


def provenance(capsys, *arguments):
    """[(row, file, line, transform)] as printed."""
    assert cli.main(["data", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    pattern = re.compile(r"row (\d+)  (.+):(\d+)  (.+)  [\d,]+ tokens, [\d,]+ trained")
    found = [pattern.fullmatch(line).groups() for line in lines[1:]]
    return [(int(row), path, int(line), transform) for row, path, line, transform in found]


@pytest.mark.parametrize("step", [1, 12])
def test_provenance_names_the_lines_whose_words_are_in_the_rows(given, whole, step, capsys):
    found = provenance(capsys, f"--run={whole.folder}", f"--step={step}")
    config = configs.resolve(sft_config(given, whole.folder))
    model = open_model(config, mesh=None)
    batch = train_loader(config, open_data(config, model, "sft")).batch(step - 1)
    tokens, segments = batch.rows.tokens, batch.rows.segments
    texts = {
        (row + 1, model.tokenizer.decode(tokens[row][segments[row] == segment]))
        for row in range(len(tokens))
        for segment in set(segments[row].tolist()) - {0}
    }
    assert len(found) == len(texts) == (batch.example_ids >= 0).sum()
    for row, path, line, transform in found:
        with open(path) as file:
            turns = json.loads(file.read().splitlines()[line - 1])["messages"]
        assert transform == "messages, whole"
        assert any(r == row and all(turn["content"] in text for turn in turns) for r, text in texts), (path, line)


def test_provenance_of_a_config_is_that_of_its_run(given, whole, tmp_path, capsys):
    values = sft_config(given, tmp_path / "nowhere", tokenize="lazy", workers=0)
    (tmp_path / "tiny.py").write_text(f"def get_config():\n    return {values!r}\n")
    expected = provenance(capsys, f"--run={whole.folder}", "--step=5")
    assert provenance(capsys, f"--config={tmp_path / 'tiny.py'}", "--step=5") == expected
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--config=dpo"], "the following arguments are required: --step"),
        (["--step=3"], "--config: missing"),
        (["--config=dpo", "--step=0"], "argument --step: expected a whole number from 1, got '0'"),
        (["--config=dpo", "--run=x", "--step=1"], "--config: contradicts --run"),
        (["--run=nowhere", "--step=1"], "nowhere: not a run folder"),
    ],
)
def test_wrong_flags_of_provenance_are_one_line(arguments, line, capsys):
    assert cli.main(["data", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_the_inputs_of_a_run_are_hashed_and_held_to(given, tmp_path, capsys):
    """A changed file is named, by provenance and by a run that would go on from it; put back, both go on."""
    import hashlib

    config = sft_config(given, tmp_path / "run")
    config["run"]["steps"] = 1
    jaxpost.run(config)
    found = json.loads((tmp_path / "run" / "inputs.json").read_text())
    weights = given[0] / "model.safetensors"
    assert found[f"model: {weights}"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found[f"data: {given[1][0]}"] == hashlib.sha256(given[1][0].read_bytes()).hexdigest()
    assert {"config", "tokenizer", "template"} <= set(found)
    config["run"] |= {"resume": True, "steps": 2}
    before = given[1][0].read_text()
    given[1][0].write_text(before.replace("How is 3 ", "How, is 3 "))
    try:
        assert cli.main(["data", f"--run={tmp_path / 'run'}", "--step=1"]) == 2
        assert f"changed since the run began: data: {given[1][0]};" in capsys.readouterr().err
        with pytest.raises(DataError, match="changed since the run began: data: "):
            jaxpost.run(config)
    finally:
        given[1][0].write_text(before)
    assert int(jaxpost.run(config).state.step) == 2


def test_a_step_beyond_the_last_is_one_line(given, tmp_path, capsys):
    values = sft_config(given, tmp_path / "run")
    values["run"] |= {"steps": None, "epochs": 1}
    (tmp_path / "tiny.py").write_text(f"def get_config():\n    return {values!r}\n")
    assert cli.main(["data", f"--config={tmp_path / 'tiny.py'}", "--step=999"]) == 2
    assert capsys.readouterr().err.startswith("error: --step: 999 is beyond the last step (step 998 is beyond the ")


def test_a_budget_of_the_embedded_world_names_its_files(given, tmp_path):
    config = sft_config(given, tmp_path / "run", train={"path": "embedded", "tokens": 1000})
    with pytest.raises(ConfigError, match=r"`embedded` is several: embedded:instructions, embedded:replay"):
        jaxpost.run(config)
