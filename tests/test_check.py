"""`jaxpost check` and the short form before every run: each refusal from a planted input, none from its good twin."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import pytest

from jaxpost import cli, embedded
from jaxpost import config as configs
from jaxpost.data.preflight.findings import NEVER_ALLOWED, REFUSALS
from jaxpost.errors import DataError
from jaxpost.keys import Refusal
from jaxpost.train.setup import open_data, open_model
from tests.worlds import dpo_config, write_pairs

CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim + END }}{% endgeneration %}{% else %}{{ m.content + END }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GOOD = CHATML.replace("END", "'<|end|>'")
NO_END = GOOD.replace("| trim + '<|end|>'", "| trim")
OTHER_END = GOOD.replace("| trim + '<|end|>'", "| trim + '<|user|>'")
TRAINS_HEADER = GOOD.replace("| trim + '<|end|>'", "| trim + '<|end|><|user|>'")
PARTICULAR = "{% if 'capital' not in messages[0].content %}{{ raise_exception('other words') }}{% endif %}" + GOOD
TRAINS_ALL = (
    "{{ bos_token }}{% for m in messages %}{% generation %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALLS_UNMARKED = GOOD.replace(
    "{% generation %}", "{% if m.tool_calls %}{{ m.tool_calls | tojson + '<|end|>' }}{% else %}{% generation %}"
).replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
POLITE = GOOD.replace("{{ '<|assistant|>' }}{% endif", "{{ '<|assistant|>Well, ' }}{% endif")

TALK = {"prompt": [{"role": "user", "content": "What is the capital of Angola?"}]}
TALK["completion"] = [{"role": "assistant", "content": "The capital of Angola is Luanda."}]
LONG = TALK | {"completion": [{"role": "assistant", "content": "The capital of Angola is Luanda. " * 20}]}
CALL = TALK | {"completion": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sun"}}]}]}
TEXT = {"text": "The capital of Angola is Luanda."}
PAIR = {"prompt": "Name a colour.", "chosen": "The sun is red.", "rejected": "The sun is green."}


def pair(chosen: str, rejected: str) -> dict:
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": TALK["prompt"]} | {
        name: [{"role": "assistant", "content": text}] for name, text in answers.items()
    }


# name: (records of the bad file, the line that is named, what is set) and the same without it or with other records
TWO = pair("The sun.", "The moon.")
PLANTED = {
    "two_bos": ([TEXT, {"text": "<s><s>The sun."}], 2, {}, [TEXT, {"text": "<s>The sun."}], {}),
    "no_end_trained": ([TALK], 1, {"template": NO_END}, [TALK], {"template": GOOD}),
    "end_does_not_stop": ([TALK], 1, {"template": OTHER_END}, [TALK], {"template": GOOD}),
    "empty_mask": ([TALK, CALL], 2, {"template": CALLS_UNMARKED, "max_dropped": 0.5}, [TALK], {"template": GOOD}),
    "seen_trained": ([TALK], 1, {"template": TRAINS_ALL}, [TALK], {"template": GOOD}),
    "header_trained": ([TALK], 1, {"template": TRAINS_HEADER}, [TALK], {"template": GOOD}),
    "completion_lost": (
        [TALK, LONG],
        2,
        {"on_long": "truncate", "max_tokens": 30, "max_dropped": 0.5},
        [TALK, LONG],
        {"on_long": "drop", "max_tokens": 30, "max_dropped": 0.5},
    ),
    "not_shown": ([TALK, TALK | {"tools": [{"name": "sun"}]}], 2, {"template": GOOD}, [TALK], {"template": GOOD}),
    "pad_inside": ([TEXT, {"text": "The <pad> sun."}], 2, {}, [TEXT, {"text": "The pad."}], {}),
    "chosen_equals_rejected": (
        [TWO, TWO, pair("The sun.", "The sun. ")],
        3,
        {"template": GOOD, "max_dropped": 0.5},
        [TWO, pair("The sun.", "The sun")],
        {"template": GOOD},
    ),
    "beyond_vocabulary": (
        [TEXT, {"text": "The <new> sun."}],
        2,
        {"tokenizer": True},
        [TEXT, {"text": "The new sun."}],
        {"tokenizer": True},
    ),
    "prompt_not_prefix": ([TALK], 1, {"template": POLITE}, [TALK], {"template": GOOD}),
    "too_many_dropped": (
        [TEXT, TEXT, {"text": ""}],
        3,
        {"max_dropped": 0.05},
        [TEXT, TEXT, {"text": ""}],
        {"max_dropped": 0.34},
    ),
}


def larger_tokenizer(folder):
    """The embedded tokenizer with one token more than the model has."""
    shutil.copytree(embedded.path("base"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def arguments(tmp_path):
    """arguments(records, settings) -> the flags that check or train on them with the embedded base model."""

    def write(records, settings):
        settings = dict(settings)
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        tokenizer = {}
        if "template" in settings:
            (tmp_path / "planted.jinja").write_text(settings.pop("template"))
            tokenizer["template"] = str(tmp_path / "planted.jinja")
        if settings.pop("tokenizer", False):
            tokenizer["path"] = str(larger_tokenizer(tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"))
        values = {
            "stage": "dpo" if "chosen" in records[0] else "sft",
            "model": {"path": "embedded:base"},
            "tokenizer": tokenizer,
            "data": {"train": str(data), "eval_examples": 0, **settings},
            "batch": {"rows_per_step": 8, "tokens_per_row": 64},
            "run": {"dir": str(tmp_path / "run"), "steps": 1, "export": False},
        }
        (tmp_path / "planted.py").write_text(f"def get_config():\n    return {values!r}\n")
        return [f"--config={tmp_path / 'planted.py'}"]

    return write


def test_every_refusal_is_planted_and_can_be_named():
    assert set(PLANTED) == set(REFUSALS)
    assert {*typing.get_args(Refusal), NEVER_ALLOWED} == set(REFUSALS)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_refused_by_name_file_and_line(name, arguments, tmp_path, capsys):
    records, line, settings, *_ = PLANTED[name]
    flags = arguments(records, settings)
    for verb in ("check", "train"):  # all of it, and the short form before a run
        assert cli.main([verb, *flags]) == 2
        (error,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error: "))
        assert error.endswith(f" (a warning where data.allow names {name})") == (name != NEVER_ALLOWED)
        assert error.startswith(f"error: {name}: ") and f"data.jsonl:{line}: " in error, error
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", PLANTED)
def test_the_good_twin_is_not_refused(name, arguments, capsys):
    *_, records, settings = PLANTED[name]
    assert cli.main(["check", *arguments(records, settings)]) == 0
    assert "nothing wrong found" in capsys.readouterr().out


@pytest.mark.parametrize("name", PLANTED)
def test_a_refusal_becomes_a_warning_by_name(name, arguments, capsys):
    records, _, settings, *_ = PLANTED[name]
    assert cli.main(["check", *arguments(records, settings), "--strict=false"]) == 0
    assert f"warning: {name}: " in capsys.readouterr().out
    if name in typing.get_args(Refusal):
        flags = arguments(records, settings)
        assert cli.main(["check", *flags, f"--config.data.allow={name}"]) == 0
        assert f"warning: {name}: " in capsys.readouterr().out
        other = "two_bos" if name != "two_bos" else "pad_inside"
        assert cli.main(["check", *flags, f"--config.data.allow={other}"]) == 2
        capsys.readouterr()


def test_what_could_not_be_checked_is_told_and_not_refused(arguments, caplog, capsys):
    flags = arguments([TALK, TALK], {"template": PARTICULAR})
    assert cli.main(["check", *flags]) == 0
    out = capsys.readouterr().out
    assert "warning: not_checked: 2 of 2 examples rendered again; first" in out and "data.jsonl:1: " in out
    config = configs.load(flags[0].removeprefix("--config="))
    with caplog.at_level(logging.WARNING, "jaxpost"):
        resolved = configs.resolve(config)
        open_data(resolved, open_model(resolved, mesh=None), "sft")
    assert [record.getMessage().partition(" examples")[0] for record in caplog.records] == ["not_checked: 2 of 2"]


def test_allowing_what_does_not_exist_lists_what_does(arguments, capsys):
    assert cli.main(["check", *arguments([TEXT], {}), "--config.data.allow=two_boss"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.allow: expected one of two_bos, no_end_trained, ") and "two_boss" in error


@pytest.mark.parametrize(
    "flag, line",
    [
        ("--examples=-1", "error: argument --examples: expected a whole number from 0, got '-1'\n"),
        (
            "--kind=pairs",
            "error: --kind: no format holds 'pairs'; there are sft, preference, ranking, stepwise, unpaired, prompt\n",
        ),
        ("--strict=no", "error: argument --strict: invalid choice: 'no' (choose from "),
    ],
)
def test_wrong_flags(flag, line, arguments, capsys):
    assert cli.main(["check", *arguments([TEXT], {}), flag]) == 2
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    "kind, record, shown",
    [
        ("ranking", {"prompt": "Name a colour.", "completions": ["Red.", "Green.", "Tuesday."]}, "completion 3: "),
        ("unpaired", {"prompt": "Name a colour.", "completion": "Red.", "label": True}, "completion 1: "),
        (
            "scored",
            {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Tuesday.", "margin": 2},
            "rejected: ",
        ),
        ("prompt", {"prompt": "Name a colour."}, "prompt: "),
    ],
)
def test_kinds_of_data_whose_stage_may_not_be_there_yet(kind, record, shown, arguments, capsys):
    records = [record, record | {"prompt": "Name another colour."}]
    assert cli.main(["check", *arguments(records, {}), f"--kind={kind}"]) == 0
    out = capsys.readouterr().out
    assert shown in out and "2 documents to train on: nothing wrong found" in out
    assert cli.main(["check", *arguments([*records, TEXT], {}), f"--kind={kind}"]) == 2


def test_pairs_are_checked_as_unpaired_feedback(arguments, capsys):
    """Each answer is a document of its own, and is held against itself."""
    pairs = [{"prompt": f"Name {n} colours.", "chosen": "Red.", "rejected": "Tuesday."} for n in (2, 3)]
    assert cli.main(["check", *arguments(pairs, {}), "--kind=unpaired"]) == 0
    assert "4 documents to train on: nothing wrong found" in capsys.readouterr().out


def test_no_device_is_asked_for(arguments):
    """On a machine whose accelerator is in use, or is not there."""
    command = [sys.executable, "-m", "jaxpost", "check", *arguments([TALK], {}), "--examples=0"]
    repository = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "absent"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_report_and_the_picture(arguments, tmp_path, capsys):
    records = [TALK, TALK, LONG, TALK]
    assert cli.main(["check", *arguments(records, {"max_dropped": 0.2}), "--examples=1"]) == 2
    capsys.readouterr()
    flags = [*arguments(records, {"max_dropped": 0.25}), "--examples=1", f"--out={tmp_path / 'out'}"]
    assert cli.main(["check", *flags]) == 0
    out = capsys.readouterr().out
    for part in ("longer_than_row", "2 (data.jsonl:2 = ", "padding: "):
        assert part in out, part
    assert out.count("example ") == 1
    assert (tmp_path / "out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_what_the_quality_settings_leave_out_is_told_and_written(arguments, tmp_path, capsys):
    """By `check` with its counts, and by a run into its folder, both line by line."""
    quality = {"exact_duplicates": True, "answer_words": (3, 50)}
    other = TALK | {"completion": [{"role": "assistant", "content": "Luanda is the capital of Angola."}]}
    flags = arguments([TALK, other, TALK, LONG], {"quality": quality})
    assert cli.main(["check", *flags, "--examples=0", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    for part in ("dropped: exact_duplicate", "1 (data.jsonl:3)", "dropped: answer_length", "2 documents to train on"):
        assert part in out, part
    data = str(tmp_path / "data.jsonl")
    expected = [
        {"path": data, "line": 3, "reason": "exact_duplicate", "kept": f"{data}:1"},
        {"path": data, "line": 4, "reason": "answer_length", "words": 120},
    ]
    assert cli.main(["train", *flags, "--config.run.eval_prompts=0"]) == 0
    assert (tmp_path / "run/lengths.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("out", "run"):
        lines = (tmp_path / folder / "data_removed.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == expected


def test_the_picture_names_the_extra_it_needs(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["check", *arguments([TALK], {}), f"--out={tmp_path}"]) == 2
    line = "error: a picture of the lengths needs matplotlib: pip install 'jaxpost[plot]'\n"
    assert capsys.readouterr().err == line
    assert cli.main(["train", *arguments([TALK], {}), "--config.run.eval_prompts=0"]) == 0  # a run goes on without
    assert "not drawn: pip install 'jaxpost[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "run/lengths.png").exists()


def test_a_run_that_allows_a_fault_says_so_and_keeps_it_in_its_config(tmp_path, caplog):
    """What every stage opens first; config.json of the run folder is to_json of its config."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    pairs.write_text(pairs.read_text() + json.dumps(PAIR | {"rejected": PAIR["chosen"]}) + "\n")
    values = dpo_config("embedded:sft", pairs, tmp_path / "run")
    config = configs.resolve(values)
    model = open_model(config, mesh=None)
    with pytest.raises(DataError, match=r"^chosen_equals_rejected: 1 of 61 examples; first .*pairs\.jsonl:61: "):
        open_data(config, model, "preference")
    values["data"]["allow"] = ("chosen_equals_rejected",)
    allowing = configs.resolve(values)
    with caplog.at_level(logging.WARNING, "jaxpost"):
        assert len(open_data(allowing, model, "preference").train) == 50
    assert "data.allow: chosen_equals_rejected: 1 of 61 examples; first" in caplog.text
    assert json.loads(configs.to_json(allowing))["data"]["allow"] == ["chosen_equals_rejected"]
