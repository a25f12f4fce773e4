"""Checkpoints merged into a folder: what is written, how much is held in memory, what is refused, `jaxpost merge`."""

import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost import cli
from jaxpost.errors import CheckpointError
from jaxpost.models.hf import export, load_params, merge
from jaxpost.models.merging import METHODS, Recipe
from jaxpost.models.policy import Policy
from tests.models.tiny import random_params, tiny_config
from tests.worlds import write_model

POLICY = Policy(tiny_config())
FILES = {"tokenizer.model": b"words", "chat_template.jinja": b"{{ x }}", "additional_chat_templates/tool.jinja": b"t"}
LINEAR = Recipe("linear", (1.0, 3.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models: in one file, in several, in bfloat16; only the first has files beside its weights."""
    at = tmp_path_factory.mktemp("given")
    export(at / "a", random_params(POLICY, 0), POLICY, FILES)
    export(at / "b", random_params(POLICY, 1), POLICY, {}, shard_bytes=10_000)
    export(at / "c", random_params(POLICY, 2), POLICY, {}, dtype="bfloat16")
    return at / "a", at / "b", at / "c"


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def recipe(method, count=2):
    sparse = {"density": 0.5} if METHODS[method].sparse else {}
    return Recipe(method, tuple(1.0 + n for n in range(count)), **sparse)


def test_linear_writes_a_model_of_weighted_means(folders, tmp_path):
    first, second, _ = folders
    merge(tmp_path / "out", [first, second], LINEAR, shard_bytes=10_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    merged, one, other = (tensors_of(folder) for folder in (tmp_path / "out", first, second))
    assert merged.keys() == one.keys() == index["weight_map"].keys()
    for name, value in merged.items():
        expected = (one[name].astype(np.float64) + 3 * other[name].astype(np.float64)) / 4
        np.testing.assert_array_equal(value, expected.astype(np.float32), err_msg=name)
    jax.tree.map(
        lambda x, a, b: np.testing.assert_allclose(x, (a + 3 * b) / 4, rtol=1e-6, atol=1e-7),
        *(load_params(folder, POLICY) for folder in (tmp_path / "out", first, second)),
    )


def test_config_and_tokenizer_are_those_of_the_first_and_the_recipe_is_noted(folders, tmp_path):
    merge(tmp_path / "out", folders[:2], LINEAR)
    for name in ("config.json", "generation_config.json", *FILES):
        assert (tmp_path / "out" / name).read_bytes() == (folders[0] / name).read_bytes()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(modes) == 1  # safetensors alone would let nobody else read the weights
    noted = json.loads((tmp_path / "out/merge.json").read_text())
    assert (noted["method"], noted["weights"], noted["models"]) == ("linear", [1, 3], [str(f) for f in folders[:2]])
    merge(tmp_path / "ties", folders[1:], recipe("ties"), base=folders[0])
    assert (tmp_path / "ties/tokenizer.model").read_bytes() == b"words"
    assert json.loads((tmp_path / "ties/merge.json").read_text())["base"] == str(folders[0])


@pytest.mark.parametrize("dtype, written", [(None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_the_type_of_the_weights(folders, tmp_path, dtype, written):
    merge(tmp_path / "out", folders[1:], recipe("linear"), dtype=dtype)
    assert {str(tensor.dtype) for tensor in tensors_of(tmp_path / "out").values()} == {written}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == written
    load_params(tmp_path / "out", POLICY)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_the_same_file(folders, tmp_path, method):
    base = folders[0] if METHODS[method].needs_base else None
    merge(tmp_path / "out", [folders[0]] * 2, recipe(method), base=base)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folders[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_how_files_are_cut_does_not_matter(folders, tmp_path, method):
    base = folders[2] if METHODS[method].needs_base else None
    export(tmp_path / "b", random_params(POLICY, 1), POLICY, {})
    merge(tmp_path / "one", [folders[0], folders[1]], recipe(method), base=base)
    merge(tmp_path / "other", [folders[0], tmp_path / "b"], recipe(method), base=base, shard_bytes=5_000)
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert {name: x.tobytes() for name, x in one.items()} == {name: x.tobytes() for name, x in other.items()}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Many small tensors: 5.2 MB, of which the largest 66 KB."""
    folder = tmp_path_factory.mktemp("deep") / "a"
    policy = Policy(tiny_config(embed_dim=64, mlp_dim=256, num_layers=20, num_heads=4, num_kv_heads=4, head_dim=16))
    export(folder, random_params(policy), policy, {})
    assert (folder / "model.safetensors").stat().st_size > 5e6
    return folder


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties"])
def test_no_model_is_ever_in_memory(deep, tmp_path, method):
    """What numpy and Python hold: one output file of 0.5 MB, and one tensor in a few float64 copies."""
    base = deep if METHODS[method].needs_base else None
    tracemalloc.start()
    try:
        merge(tmp_path / "out", [deep] * 2, recipe(method), base=base, shard_bytes=500_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5e6 < peak < 2.5e6, f"{peak:,} bytes"


# ---- what is refused, and leaves nothing behind ----


def change_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def spoil(values, at):
    values[at] = np.nan
    return values


NORM = "model.norm.weight"
BAD = {  # name: (what is done to the second folder, part of the message)
    "missing folder": (shutil.rmtree, "bad: no such folder"),
    "missing tensor": (lambda f: save_file({NORM: np.ones(16, np.float32)}, f / "model.safetensors"), "is missing"),
    "wrong shape": (lambda f: change_tensor(f, NORM, lambda x: x[:-1].copy()), f"tensor {NORM} has shape [15]"),
    "not a number": (lambda f: change_tensor(f, NORM, lambda x: spoil(x, 3)), f"tensor {NORM}: model 2 holds a value"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_model_is_refused_and_nothing_is_written(folders, tmp_path, case):
    bad = shutil.copytree(folders[0], tmp_path / "bad")
    change, words = BAD[case]
    change(bad)
    (tmp_path / "to").mkdir()
    with pytest.raises(CheckpointError) as caught:
        merge(tmp_path / "to/out", [folders[1], bad], LINEAR)
    assert words in str(caught.value)
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"embed_dim": 32}, "config.json: embed_dim is 32, but 16 in "),
        ({"num_layers": 4}, "config.json: num_layers is 4, but 3 in "),
        ({"vocab_size": 49}, "config.json: vocab_size is 49, but 48 in "),
        ({"norm_eps": 1e-6}, "config.json: norm_eps is 1e-06, but 1e-05 in "),
    ],
)
def test_another_architecture_is_refused(folders, tmp_path, changes, words):
    policy = Policy(tiny_config(**changes))
    export(tmp_path / "other", random_params(policy), policy, {})
    with pytest.raises(CheckpointError) as caught:
        merge(tmp_path / "out", [folders[0], tmp_path / "other"], LINEAR)
    assert f"{tmp_path / 'other'}/{words}{folders[0]}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ends_and_context_may_differ(folders, tmp_path):
    """An instruct model ends its turns otherwise than its base; the base's config is written."""
    policy = Policy(tiny_config(eos_ids=(2, 7), max_positions=128))
    export(tmp_path / "chat", random_params(policy, 4), policy, {})
    merge(tmp_path / "out", [tmp_path / "chat"], recipe("ties", 1), base=folders[0])
    assert (tmp_path / "out/config.json").read_bytes() == (folders[0] / "config.json").read_bytes()


def test_something_else_is_never_replaced(folders, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is not an exported model"):
        merge(tmp_path, folders[:2], LINEAR)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- the verb ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    return write_model(at / "a"), write_model(at / "b")


def test_the_verb_merges_folders(models, tmp_path, capsys):
    first, second = models
    (tmp_path / "c").mkdir()
    policy = Policy(tiny_config())
    export(tmp_path / "c", random_params(policy, 1), policy, {})
    arguments = ["--method=ties", f"--base={first}", f"--model={second}", f"--model={first}", "--weights=0.5,1.5"]
    assert cli.main(["merge", *arguments, "--density=0.3", "--scale=0.9", f"--to={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    merge(tmp_path / "same", [second, first], Recipe("ties", (0.5, 1.5), 0.3, 0.9), base=first)
    for name in ("model.safetensors", "merge.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "the following arguments are required: --method, --model, --to"),
        (["--method=mean"], "method: 'mean' is unknown; there are linear, slerp, ties, dare_linear, dare_ties"),
        (["--method=linear", "--weights=1"], "--weights: 1 numbers for 2 models; give one a --model"),
        (["--method=linear", "--weights=1,x"], "argument --weights: expected numbers with commas between them"),
        (["--method=linear", "--weights=1,-1"], "weights: their sum is 0"),
        (["--method=linear", "--base=A"], "base: linear needs none"),
        (["--method=ties", "--density=0.2"], "base: missing; ties "),
        (["--method=ties", "--base=A"], "density: missing; ties keeps this share"),
        (["--method=slerp", "--seed=1"], "seed: slerp draws nothing; leave it out"),
        (["--method=linear", "--model=nowhere"], "nowhere: no such folder"),
        (["--method=linear", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_wrong_flag_is_one_line(models, tmp_path, monkeypatch, capsys, arguments, line):
    monkeypatch.chdir(tmp_path)
    given = [f"--model={models[0]}", f"--model={models[1]}", "--to=out"] if arguments else []
    assert cli.main(["merge", *given, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_verb_names_a_run_folder_a_full_folder_and_other_words(models, tmp_path, capsys):
    run, full, renamed = tmp_path / "run", tmp_path / "full", shutil.copytree(models[0], tmp_path / "renamed")
    run.mkdir()
    (run / "config.json").write_text('{"stage": "dpo"}')
    full.mkdir()
    (full / "x").write_text("x")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    (one, _), (other, _) = words[300:302]  # [piece, score], as in every unigram model
    words[300], words[301] = words[301], words[300]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    for second, to, line in [
        (run, tmp_path / "out", f"{run}: a run folder; give its export"),
        (models[1], full, f"--to: {full} exists and is not an empty folder"),
        (renamed, tmp_path / "out", f"{renamed}: token 300 is '{other}', but '{one}' in {models[0]}"),
    ]:
        arguments = ["--method=slerp", f"--model={models[0]}", f"--model={second}", f"--to={to}"]
        assert cli.main(["merge", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not (tmp_path / "out").exists()
