"""The configuration: what is accepted, and the one line that names the key of what is not."""

import json
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from jaxpost import config as configs
from jaxpost import schema
from jaxpost.errors import ConfigError

REPOSITORY = pathlib.Path(__file__).parents[1]
SMALLEST = {"stage": "dpo", "model": {"path": "m"}, "data": {"train": "d.jsonl"}, "run": {"steps": 10}}


def resolved(**changes):
    """The smallest config with dotted keys (`__` for the dot) set to values."""
    values = json.loads(json.dumps(SMALLEST))
    for name, value in changes.items():
        section, _, leaf = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return configs.resolve(values)


def complaint(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_smallest_config_gets_every_default():
    config = resolved()
    flat = configs.flatten(config)
    assert set(flat) == set(schema.keys(configs.Config))
    for name, field in schema.keys(configs.Config).items():
        if name not in ("stage", "model.path", "data.train", "run.steps", "loss.name"):
            assert flat[name] == field.default, name
    assert config.loss.name == ("sigmoid",)
    assert resolved(stage="sft").loss.name == ("nll",)


def test_a_config_survives_the_way_through_json():
    config = resolved(loss__beta=0.2, optimizer__freeze=["embed"], run__profile=(3, 2), data__train=["a", ["b", 0.5]])
    assert configs.resolve(json.loads(configs.to_json(config))) == config
    assert configs.resolve(config) == config
    loss = configs.to_dict(config)["loss"]
    assert (loss["name"], loss["beta"], "hyperparameters" in loss) == (("sigmoid",), 0.2, False)


def test_config_dicts_and_their_references_are_read():
    config = ConfigDict(SMALLEST)
    config.run.steps = 12
    config.optimizer = ConfigDict()
    config.optimizer.warmup_steps = config.run.get_ref("steps") // 4
    assert configs.resolve(config).optimizer.warmup_steps == 3


@pytest.mark.parametrize(
    "given, pairs",
    [
        ("a.jsonl", (("a.jsonl", 1.0),)),
        (["a", "b"], (("a", 1.0), ("b", 1.0))),
        ([["a", 2], "b"], (("a", 2.0), ("b", 1.0))),
        ((("a", 0.25),), (("a", 0.25),)),
        ({"path": "a", "tokens": 500}, (("a", {"tokens": 500}),)),
        ([{"path": "a"}, {"path": "b", "weight": 2}], (("a", 1.0), ("b", 2.0))),
        (["a", ["c", {"tokens": 7}]], (("a", 1.0), ("c", {"tokens": 7}))),
    ],
)
def test_sources_become_pairs_of_path_and_amount(given, pairs):
    config = resolved(data__train=given)
    assert config.data.train == pairs
    assert configs.resolve(json.loads(configs.to_json(config))) == resolved(data__train=config.data.train)
    assert resolved(data__train=ConfigDict({"x": given}).to_dict()["x"]).data.train == pairs
    values = json.loads(json.dumps(SMALLEST))
    configs.override(values, "data.train", given if isinstance(given, str) else repr(given))
    assert configs.resolve(values).data.train == pairs


def test_the_embedded_data_bring_their_own_held_out_split():
    assert resolved(data__train="embedded").data.eval == (("embedded", 1.0),)
    assert resolved(data__train=["embedded", "mine.jsonl"]).data.eval is None
    assert resolved(data__train="embedded", data__eval="mine.jsonl").data.eval == (("mine.jsonl", 1.0),)


def test_an_integer_is_a_number_and_one_pattern_a_list():
    config = resolved(optimizer__learning_rate=1, optimizer__freeze="embed", run__log_to="wandb")
    assert type(config.optimizer.learning_rate) is float
    assert config.optimizer.freeze == ("embed",) and config.run.log_to == ("wandb",)


WRONG = [
    # unknown keys, with the nearest one
    ("optimizer__learning_rat", 1, "optimizer.learning_rat: unknown key; did you mean optimizer.learning_rate?"),
    ("optimizer__steps", 5, "optimizer.steps: unknown key; did you mean run.steps?"),
    ("learning_rate", 5, "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("optimzer", {"name": "adamw"}, "optimzer: unknown key; did you mean optimizer?"),
    ("mesh__x", 1, "mesh.x: unknown key; there are slices, data, fsdp, expert, context, tensor"),
    # types
    ("run__steps", True, "run.steps: expected an integer, got True"),
    ("run__steps", 10.0, "run.steps: expected an integer, got 10.0"),
    ("run__steps", "10", "run.steps: expected an integer, got '10'"),
    ("run__seed", None, "run.seed: expected an integer, got None"),
    ("run__resume", 1, "run.resume: expected True or False, got 1"),
    ("optimizer__learning_rate", "1e-4", "optimizer.learning_rate: expected a number, got '1e-4'"),
    ("optimizer__learning_rate", True, "optimizer.learning_rate: expected a number, got True"),
    ("optimizer__learning_rate", float("nan"), "optimizer.learning_rate: expected a finite number, got nan"),
    ("optimizer__freeze", [1], "optimizer.freeze: expected a string, got 1"),
    ("optimizer__freeze", None, "optimizer.freeze: expected a list, got None"),
    ("optimizer", 3, "optimizer: expected a section of keys, got 3"),
    ("model__path", 7, "model.path: expected a string, got 7"),
    ("run__profile", 5, "run.profile: expected 2 values, got 5"),
    ("data__train", [], "data.train: expected a path or a list of paths or [path, weight] pairs, got []"),
    ("data__train", ["a", 0.5], "data.train: expected a path or a [path, weight] pair, got 0.5"),
    ("data__train", [["a", 0]], "data.train: 0 is out of range; expected 0 < train"),
    ("data__train", {"path": "a", "tokens": 0}, "data.train: tokens of a: expected a whole number from 1, got 0"),
    (
        "data__train",
        [{"path": "a", "tokens": 5, "weight": 1}],
        "data.train: expected the keys path and weight, or path and tokens, "
        "got {'path': 'a', 'tokens': 5, 'weight': 1}",
    ),
    ("data__train", [["a", {"t": 5}]], "data.train: expected a weight or a number of tokens for a, got {'t': 5}"),
    ("data__workers", -1, "data.workers: -1 is out of range; expected 0 <= workers"),
    ("loss__beta", [0.1], "loss.beta: expected a number, True, False, a string or None, got [0.1]"),
    ("loss__beta", float("inf"), "loss.beta: expected a finite number, got inf"),
    # ranges and choices
    ("optimizer__b1", 1.0, "optimizer.b1: 1.0 is out of range; expected 0 <= b1 < 1"),
    ("optimizer__learning_rate", 0, "optimizer.learning_rate: 0 is out of range; expected 0 < learning_rate"),
    (
        "optimizer__final_fraction",
        1.5,
        "optimizer.final_fraction: 1.5 is out of range; expected 0 <= final_fraction <= 1",
    ),
    ("batch__rows_per_step", 0, "batch.rows_per_step: 0 is out of range; expected 1 <= rows_per_step"),
    ("mesh__fsdp", 0, "mesh.fsdp: 0 is out of range; expected at least 1, or -1 for the rest"),
    ("optimizer__name", "adam", "optimizer.name: expected one of adamw, adafactor, lion, muon, got 'adam'"),
    ("run__log_to", ["tensorbord"], "run.log_to: expected one of tensorboard, wandb, got 'tensorbord'"),
    ("stage", "ppp", "stage: expected one of sft, dpo, orpo, simpo, cpo, kto, reward, distill, ppo, got 'ppp'"),
]


@pytest.mark.parametrize("name, value, line", WRONG, ids=[f"{w[0]}={w[1]!r}" for w in WRONG])
def test_a_wrong_value_is_one_line_that_names_the_key(name, value, line):
    assert complaint(**{name: value}) == line


CONTRADICTIONS = [
    ({"run__steps": None}, "run.steps: missing"),
    ({"run__epochs": 2}, "run.steps: 10 contradicts run.epochs=2"),
    ({"optimizer__warmup_steps": 10}, "optimizer.warmup_steps: 10 does not fit in run.steps=10"),
    ({"run__profile": (9, 3)}, "run.profile: (9, 3) ends after run.steps=10"),
    ({"run__resume": True}, "run.dir: missing; run.resume=True"),
    ({"batch__accumulate": 3}, "batch.accumulate: 3 does not divide batch.rows_per_step=8"),
    ({"data__max_tokens": 2048}, "data.max_tokens: 2048 is more than batch.tokens_per_row=1024"),
    ({"mesh__data": -1}, "mesh.fsdp: -1 (the rest) may stand for one axis only, and mesh.data has it"),
    (
        {"mesh__data": 3},
        "batch.rows_per_step: mesh.slices x mesh.data x mesh.fsdp x mesh.expert = 3 devices do not divide",
    ),
    (
        {"mesh__data": 4, "batch__accumulate": 4},
        "batch.rows_per_step: mesh.slices x mesh.data x mesh.fsdp x mesh.expert = 4 devices do not divide",
    ),
    ({"run__eval_every": 5, "data__eval_examples": 0}, "run.eval_every: 5, but data.eval is None"),
    ({"stage": "sft", "reference__path": "x"}, "reference.path: the stage sft has no reference"),
    ({"data__tokenize": "lazy"}, "data.tokenize: 'lazy' contradicts reference.mode='cached'"),
    (
        {"data__tokenize": "lazy", "run__steps": None, "run__epochs": 1},
        "data.tokenize: 'lazy' contradicts run.epochs=1",
    ),
    (
        {"data__tokenize": "lazy", "stage": "sft", "data__train": {"path": "a", "tokens": 9}},
        "data.tokenize: 'lazy' contradicts a budget of tokens",
    ),
    ({"reference__mode": "live", "reference__cache_dir": "x"}, "reference.cache_dir: reference.mode='live'"),
    ({"reference__mode": "live", "reference__alpha": 0.5}, "reference.alpha: only a reference that moves has one"),
    ({"stage": "sft", "teacher__top_k": 4}, "teacher.top_k: the stage sft has no teacher"),
    ({"stage": "distill"}, "teacher.path: missing; give a teacher, or teacher.outputs"),
    (
        {
            "stage": "distill",
            "teacher__path": "x",
            "model__adapter": "a:b",
            "run__export": False,
            "run__eval_prompts": 0,
        },
        "model.adapter: somebody else's model cannot be distilled",
    ),
    (
        {"stage": "distill", "teacher__outputs": "x", "data__tokenize": "lazy"},
        "data.tokenize: 'lazy' contradicts teacher.outputs",
    ),
    ({"reference__every": 4}, "reference.every: only a reference that moves has one; reference.mode='cached'"),
    ({"hosts__count": 2}, "hosts.count: 2, but hosts.coordinator is None"),
    (
        {"hosts__coordinator": "10.0.0.1", "hosts__count": 2, "hosts__index": 0},
        "hosts.coordinator: '10.0.0.1' is neither",
    ),
    ({"hosts__coordinator": "10.0.0.1:80", "hosts__count": 2}, "hosts.index: missing; hosts.coordinator=host:port"),
    (
        {"hosts__coordinator": "10.0.0.1:80", "hosts__count": 2, "hosts__index": 2},
        "hosts.index: 2 is out of range; hosts.count=2",
    ),
    ({"hosts__coordinator": "auto", "sampling__engine": "http"}, "sampling.engine: 'http', but of several hosts"),
]


@pytest.mark.parametrize("changes, start", CONTRADICTIONS, ids=[c[1].partition(":")[0] for c in CONTRADICTIONS])
def test_keys_that_contradict_each_other_are_named(changes, start):
    assert complaint(**changes).startswith(start)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__warmup_steps": 9},
        {"run__profile": (9, 2)},
        {"run__steps": None, "run__epochs": 2, "optimizer__warmup_steps": 50},
        {"data__max_tokens": 1024},
        {"mesh__data": -1, "mesh__fsdp": 1},
        {"mesh__data": 4, "batch__accumulate": 2},
        {"run__resume": True, "run__dir": "x"},
        {"data__tokenize": "lazy", "reference__mode": "live"},
    ],
)
def test_the_edge_of_a_contradiction_is_allowed(changes):
    resolved(**changes)


def test_missing_keys_are_named():
    for section, leaf in (("model", "path"), ("data", "train")):
        values = json.loads(json.dumps(SMALLEST))
        del values[section][leaf]
        with pytest.raises(ConfigError, match=f"^{section}.{leaf}: missing; "):
            configs.resolve(values)
    with pytest.raises(ConfigError, match=r"^config: expected a ConfigDict or dict, got list"):
        configs.resolve([])


def test_differences_names_changed_new_and_absent_keys():
    a, b = resolved(loss__beta=0.1), resolved(loss__gamma=1.0, run__steps=20)
    assert configs.differences(a, b) == {"loss.beta": (0.1, None), "run.steps": (10, 20), "loss.gamma": (None, 1.0)}
    assert configs.differences(a, a) == {}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("loss.beta", "0.2", 0.2),
        ("loss.kind", "hinge", "hinge"),
        ("run.steps", "5", 5),
        ("run.steps", "None", None),
        ("run.resume", "true", True),
        ("run.dir", "2024", "2024"),  # a folder may be called 2024
        ("run.dir", "None", None),
        ("run.profile", "(10, 5)", (10, 5)),
        ("data.train", "a,b.jsonl", "a,b.jsonl"),
        ("data.train", "[['a', 0.5], 'b']", [["a", 0.5], "b"]),
        ("data.eval", "None", None),
        ("optimizer.freeze", "embed", "embed"),
        ("optimizer.freeze", "['a', 'b']", ["a", "b"]),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("stage", "sft", "sft"),
        ("run.compilation_cache", "", ""),
    ],
)
def test_an_override_is_read_as_the_type_of_its_key(name, text, value):
    values = {}
    configs.override(values, name, text)
    assert configs.flatten(values) == {name: value}


def test_an_override_of_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match=r"^run\.step: unknown key; did you mean run\.steps\?"):
        configs.override({}, "run.step", "3")
    with pytest.raises(ConfigError, match=r"^run: expected a section of keys, got 3"):
        configs.override({"run": 3}, "run.steps", "3")
    with pytest.raises(ConfigError, match=r"^run\.steps: expected an integer, got 'many'"):
        configs.override(values := json.loads(json.dumps(SMALLEST)), "run.steps", "many")
        configs.resolve(values)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_resolves_and_is_a_lab_note(path):
    config = configs.resolve(configs.load(str(path)))
    assert config.stage == path.stem
    note = path.read_text()
    for part in ("Paper:", "Expected:", f"--config=configs/{path.name}", "https://arxiv.org/abs/"):
        assert part in note, f"{path.name} does not say {part}"
    for line in note.splitlines():  # each value has its unit, range or choices beside it
        if line.startswith("    config.") and "ConfigDict" not in line and not line.startswith("    config.stage"):
            assert "  # " in line, line


def test_configs_are_found_by_path_then_in_the_working_folder_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = configs.find("dpo")
    assert packaged.samefile(REPOSITORY / "configs" / "dpo.py") and configs.find("configs/dpo.py") == packaged
    for name in ("plans/llama3_8b_dpo", "configs/plans/llama3_8b_dpo.py"):
        assert configs.find(name).samefile(REPOSITORY / "configs" / "plans" / "llama3_8b_dpo.py")
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "configs" / "dpo.py"
    mine.write_text("def get_config():\n    return {'stage': 'mine'}\n")
    assert configs.find("dpo").samefile(mine) and configs.load("dpo") == {"stage": "mine"}
    (tmp_path / "dpo").write_text("def get_config():\n    return {'stage': 'path'}\n")
    assert configs.load("dpo") == {"stage": "path"}


def test_a_config_file_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("x = 1\ndef get_config(:\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "number.py").write_text("def get_config():\n    return 3\n")
    for name, line in (
        ("ppo2", r"--config: no file ppo2, and no config of that name; there are .*dpo, .*sft"),
        ("other/dpo.py", r"--config: no file other/dpo\.py"),
        ("broken.py", r"--config: broken\.py:2: "),
        ("empty.py", r"--config: empty\.py defines no get_config\(\)"),
        ("number.py", r"config: expected a ConfigDict or dict, got int"),
    ):
        with pytest.raises(ConfigError, match=f"^{line}"):
            configs.load(name)


def test_checking_a_config_loads_no_jax():
    code = "import sys; from jaxpost import config; config.resolve(config.load('dpo')); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "plans").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_every_plan_is_a_config(path):
    resolved = configs.resolve(configs.load(str(path)))
    assert (
        resolved.model.path.startswith("shape:")
        and f"--config=configs/plans/{path.name} --topology=" in path.read_text()
    )
