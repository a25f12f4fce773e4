"""The command line: verbs, flags, and every mistake of input as one line with exit code 2."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost import api, cli
from jaxpost.errors import CheckpointError
from jaxpost.main import main as train
from jaxpost.train.run import LoadedModel
from tests.worlds import dpo_config, write_model, write_pairs

REPOSITORY = pathlib.Path(__file__).parents[1]
OVERRIDES = ["--config.loss.beta=0.25", "--config.run.seed=7"]
ASK = ["--checkpoint=embedded:sft", "--prompts=embedded:prompts", "--to=out.jsonl", "--url=http://localhost:1"]
PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Tuesday."}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A run folder made by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(write_config(folder, *given, *OVERRIDES)) == 0
    return folder / "run"


def write_config(folder: pathlib.Path, model, pairs, *flags: str, **run) -> list[str]:
    """The arguments that train a tiny model for two steps in `folder`/run, with one prompt completed too."""
    values = dpo_config(model, pairs, folder / "run", **{"steps": 2, "eval_prompts": 1, "eval_new_tokens": 4, **run})
    (folder / "tiny.py").write_text(f"def get_config():\n    return {values!r}\n")
    return [f"--config={folder / 'tiny.py'}", *flags]


def complaint(capsys, code: int) -> str:
    """The one line of an error, after checking that it is one."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and err.rstrip("\n").endswith(lines[0]), (code, err)
    assert "Traceback" not in out + err
    return lines[0].removeprefix("error: ")


# ---- verbs and flags ----


def test_help_lists_the_verbs_and_every_key(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate" in out and "0 < x" in out and "loss.*" in out


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["trane"], "trane: unknown verb; there are train, check, plan, data, teach, chat, generate, export"),
        (["train"], "--config: missing; give a config file, as in --config=configs/dpo.py"),
        (["train", "--config=dppo"], "--config: no file dppo, and no config of that name; there are d"),
        (["train", "--config=dpo", "--steps=3"], "--steps=3: unknown argument; keys are set by --config.KEY=VALUE"),
        (["train", "--config=dpo", "--config.run.steps"], "run.steps: no value; write --config.run.steps=VALUE"),
        (["train", "--config=dpo", "--config.run.step=3"], "run.step: unknown key; did you mean run.steps?"),
        (["check", "--config=dpo", "--config.run.steps=1.5"], "run.steps: expected an integer, got 1.5"),
        (["train", "--config=dpo", "--config.batch.accumulate=3"], "batch.accumulate: 3 does not divide"),
        (["chat"], "the following arguments are required: --checkpoint"),
        (["chat", "--checkpoint=x", "--max-new-tokens=0"], "--max-new-tokens: 0 is out of range"),
        (["generate", *ASK, "--top-p=2"], "--top-p: 2.0 is out of range; expected above 0, at most 1"),
        (["generate", *ASK, "--stop="], "--stop: ('',) is out of range; expected strings that are not empty"),
        (["generate", *ASK, "--max-new-tokens=0"], "--max-new-tokens: 0 is out of range; expected at least 1"),
        (["generate", *ASK, "--logit-bias=a"], "argument --logit-bias: expected ID=BIAS, as in 42=-1.5, got 'a'"),
        (["generate", *ASK, "--completions=0"], "--completions: 0 is out of range; expected at least 1"),
        (["generate", *ASK, "--reward=a:b", "--reward-timeout=0"], "--reward-timeout: 0 is out of range"),
        (["generate", *ASK, "--best-of=4"], "--reward: missing; --best-of needs what says which is best"),
        (["generate", *ASK, "--best-of=2", "--reward=x", "--completions=3"], "--best-of: 2 are fewer than the"),
        (["generate", *ASK, "--adapter=x"], "--adapter: contradicts --url"),
        (["generate", *ASK, "--api-key-env=NO_KEY"], "--api-key-env: there is no environment variable NO_KEY"),
        (["generate", *ASK, "--prompts=nowhere.jsonl"], "nowhere.jsonl: "),
        (["export", "--run=nowhere", "--to=new"], "nowhere: "),
        (["chat", "--checkpoint=embedded:bass"], "embedded:bass: "),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint(capsys, cli.main(arguments)).startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["jaxpost", "jaxpost.main"])
def test_modules_exit_with_the_code(module):
    arguments = (["train"] if module == "jaxpost" else []) + ["--config=dpo", "--config.run.seed=True"]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: run.seed: expected an integer, got True\n")


# ---- the verbs on a tiny model ----


def test_train_writes_the_run_with_the_overrides_resolved(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["loss"]["beta"] == 0.25 and config["run"]["seed"] == 7 and config["optimizer"]["b1"] == 0.9
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss" in row)
    assert first["step"] == 1 and first["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_check_shows_examples_and_the_report(given, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(given[1].read_text() + json.dumps(PAIR | {"rejected": ""}) + "\n")
    assert cli.main(["check", *write_config(tmp_path, given[0], pairs)]) == 0
    out = capsys.readouterr().out
    for part in ("chosen:", "rejected:", "trained", "empty_completion", "pairs.jsonl:61", "50 documents to train on"):
        assert part in out, part
    assert not (tmp_path / "run").exists()


def test_chat_answers_each_line_of_standard_input(finished, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nName a colour.\nAnd another?\n"))
    seen, given = [], []

    def chat(self, messages, **how):
        seen.append(messages[:])
        given.append(how)
        return "yes"

    monkeypatch.setattr(LoadedModel, "chat", chat)
    flags = ["--max-new-tokens=3", "--temperature=0.5", "--top-p=0.9", "--stop=END", "--seed=4"]
    assert cli.main(["chat", f"--checkpoint={finished}", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["yes", "yes", "yes"]
    assert [[message["content"] for message in messages] for messages in seen] == [
        ["Hello"],
        ["Name a colour."],  # an empty line began a new conversation
        ["Name a colour.", "yes", "And another?"],
    ]
    assert [how["seed"] for how in given] == [4, 5, 6]  # other draws each turn
    wanted = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "stop": ("END",), "top_k": None}
    assert {name: given[0][name] for name in wanted} == wanted


def test_chat_talks_to_real_weights(given, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert cli.main(["chat", f"--checkpoint={given[0]}", "--max-new-tokens=4"]) == 0
    assert len(capsys.readouterr().out.strip().split()) <= 8


def test_chat_draws_by_temperature_and_seed(given, capsys, monkeypatch):
    def answers(*flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nHello\n"))
        assert cli.main(["chat", f"--checkpoint={given[0]}", "--max-new-tokens=8", *flags]) == 0
        return capsys.readouterr().out.strip()

    first = answers("--temperature=1", "--seed=1")
    assert first == answers("--temperature=1", "--seed=1") != answers("--temperature=1", "--seed=2")
    chosen = answers("--temperature=1", "--choice=Yes", "--choice=No").split()
    assert len(chosen) == 2 and set(chosen) <= {"Yes", "No"}


def test_a_run_is_opened_without_its_weights(finished):
    copy = shutil.copytree(finished, finished.parent / "copy")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        api.load(copy)
    opened = api.load(copy, weights=False)
    assert opened.params is None and opened.model.tokenizer.encode("Hello")


def test_export_writes_a_model_folder_and_nothing_over(finished, given, tmp_path, capsys):
    target = tmp_path / "out"
    assert cli.main(["export", f"--run={finished}", f"--to={target}"]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (target, given[0]))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    assert any(np.abs(ours[name].astype(np.float32) - theirs[name]).max() > 0 for name in ours)  # it was trained
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    capsys.readouterr()
    line = complaint(capsys, cli.main(["export", f"--run={finished}", f"--to={target}"]))
    assert line == f"--to: {target} exists and is not an empty folder; give another"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


# ---- bad input: each one line that names file, line or key ----

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
OTHER = ASSISTANT | {"content": "No."}
BAD_DATA = {  # name: (lines of the file, flags, parts of the message)
    "empty file": ([], [], ["pairs.jsonl"]),
    "broken JSON": ([json.dumps(PAIR), '{"prompt": '], [], ["pairs.jsonl:2"]),
    "not a record": ([json.dumps(PAIR), "[1]"], [], ["pairs.jsonl:2"]),
    "unknown fields": ([json.dumps({"question": "a"})], [], ["pairs.jsonl:1"]),
    "empty completion": (
        [json.dumps(PAIR), json.dumps(PAIR | {"chosen": ""})],
        ["error"],
        ["pairs.jsonl:2", "empty_completion"],
    ),
    "chosen is rejected": ([json.dumps(PAIR | {"rejected": "Red."})], ["error"], ["pairs.jsonl:1", "reject"]),
    "nothing left": ([json.dumps(PAIR | {"rejected": ""})] * 3, [], ["pairs.jsonl", "empty_completion 3"]),
    "unknown role": (
        [json.dumps({"prompt": [{"role": "wizard", "content": "x"}], "chosen": [ASSISTANT], "rejected": [OTHER]})],
        ["error"],
        ["pairs.jsonl:1", "wizard"],
    ),
    "two systems": (
        [json.dumps({"prompt": [SYSTEM, SYSTEM, USER], "chosen": [ASSISTANT], "rejected": [OTHER]})],
        ["error"],
        ["pairs.jsonl:1", "system"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_leaves_nothing_behind(case, given, tmp_path, capsys):
    lines, on_bad, parts = BAD_DATA[case]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(line + "\n" for line in lines))
    flags = [f"--config.data.on_bad={value}" for value in on_bad]
    line = complaint(capsys, train(write_config(tmp_path, given[0], pairs, *flags)))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_a_missing_file_is_named(given, tmp_path, capsys):
    assert "nowhere.jsonl" in complaint(capsys, train(write_config(tmp_path, given[0], tmp_path / "nowhere.jsonl")))
    assert not (tmp_path / "run").exists()


def change_weights(folder: pathlib.Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")


def change_config(folder: pathlib.Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


NORM = "model.norm.weight"
BAD_MODELS = {  # name: (what is done to the folder, part of the message)
    "no folder": (shutil.rmtree, "model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "truncated safetensors": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors"),
    "missing tensor": (lambda folder: change_weights(folder, lambda t: t.pop(NORM)), NORM),
    "wrong shape": (lambda folder: change_weights(folder, lambda t: t.update({NORM: t[NORM][:-1]})), NORM),
    "tokenizer larger than the model": (lambda folder: change_config(folder, vocab_size=100), "100"),
    "another family": (lambda folder: change_config(folder, model_type="gpt9"), "gpt9"),
}


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_folder_is_one_line_and_leaves_nothing_behind(case, given, tmp_path, capsys):
    spoil, part = BAD_MODELS[case]
    model = shutil.copytree(given[0], tmp_path / "model")
    spoil(model)
    line = complaint(capsys, train(write_config(tmp_path, model, given[1])))
    assert part in line, line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_template_that_never_renders_the_assistant_is_one_line(given, tmp_path, capsys):
    template = tmp_path / "silent.jinja"
    template.write_text("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    flags = [f"--config.tokenizer.template={template}"]
    complaint(capsys, train(write_config(tmp_path, *given, *flags)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rejected": None}, "rejected must be text"),
        ({"score_chosen": 1, "score_rejected": 1}, "chosen has the score 1, rejected 1"),
        ({"margin": float("nan")}, "expected finite numbers, found nan"),
    ],
)
def test_a_pair_without_a_winner_is_one_line(change, said, given, tmp_path, capsys):
    """With data.on_bad=error its line is named; where every pair is so, that ends the run as well."""
    scored = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No.", "margin": 1.0}
    bad = {"prompt": "Q?", "chosen": "Yes.", "rejected": "No."} | change
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(f"{json.dumps(scored)}\n{json.dumps(bad)}\n")
    flags = ["--config.loss.name=odpo", "--config.data.on_bad=error"]
    line = complaint(capsys, train(write_config(tmp_path, given[0], pairs, *flags)))
    assert line.startswith(f"{pairs}:2: ") and said in line, line
    pairs.write_text(f"{json.dumps(bad)}\n")
    assert "nothing left" in complaint(capsys, train(write_config(tmp_path, given[0], pairs, flags[0])))


def test_an_unknown_loss_or_hyperparameter_is_one_line(given, tmp_path, capsys):
    assert "sigmoyd" in complaint(capsys, train(write_config(tmp_path, *given, "--config.loss.name=sigmoyd")))
    assert "betta" in complaint(capsys, train(write_config(tmp_path, *given, "--config.loss.betta=0.1")))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_config_is_refused_and_left_as_it_was(finished, given, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    folder = finished.parent
    assert "run.dir: " in complaint(capsys, train(write_config(folder, *given)))
    flags = [*OVERRIDES, "--config.run.resume=True", "--config.optimizer.b1=0.8"]
    assert complaint(capsys, train(write_config(folder, *given, *flags))).startswith("optimizer.b1: ")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
