"""Checkpoints in Hugging Face layout: what comes in, what goes out, what is refused."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxpost.errors import CheckpointError
from jaxpost.models.hf import export, load_params, names, read_config, resolve
from jaxpost.models.hf.names import Weight, from_slice, to_tensor
from jaxpost.models.policy import Policy
from jaxpost.ops.rope import Rope
from jaxpost.sharding import make_mesh, named_shardings
from tests.models.tiny import random_params, tiny_config

CONFIG = tiny_config()
POLICY = Policy(CONFIG)
SIZES = {"D": 6, "H": 4, "h": 2, "F": 5}


@pytest.fixture(scope="module")
def params():
    return random_params(POLICY)


@pytest.fixture(scope="module")
def exported(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    export(str(folder), params, POLICY, {"tokenizer.json": b"{}"})
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(folder, change, filename="config.json"):
    values = json.loads((folder / filename).read_text())
    change(values)
    (folder / filename).write_text(json.dumps(values))


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Weights


@pytest.mark.parametrize("dims", ["(H h) D -> D H h", "D (H h) -> H h D", "F D -> D F", "D -> D"])
def test_a_slice_of_a_parameter_is_read_from_the_tensor(dims):
    """Every slice of the parameter, the tensor being written by to_tensor; and not one element more than needed."""
    weight = Weight("w", "w", dims)
    shape = [SIZES[letter] for letter in weight.letters()]
    whole = np.random.default_rng(0).normal(size=shape)
    tensor = to_tensor(weight, whole)
    assert tensor.flags.c_contiguous
    assert tensor.shape == weight.shape(SIZES)
    halves = tuple(
        slice(n // 2, n) if letter != "h" else slice(0, n) for letter, n in zip(weight.letters(), shape, strict=True)
    )
    read = []

    class Lazy:
        def __getitem__(self, index):
            read.append(tensor[index].size)
            return tensor[index]

    for index in (tuple(slice(0, n) for n in shape), halves):
        np.testing.assert_array_equal(from_slice(weight, Lazy(), index, SIZES), whole[index])
        assert read[-1] == whole[index].size


def test_llama_names_and_layouts(exported, params):
    """The files hold what transformers expects under each name: [outputs, inputs]."""
    tensors = load_file(exported / "model.safetensors")
    layer = jax.tree.map(lambda p: np.asarray(p[1]), params["layers"])
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q, layer["attn"]["q"]["weight"].reshape(16, 32).T)
    o = tensors["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(o, layer["attn"]["o"]["weight"].reshape(32, 16).T)
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(up, layer["mlp"]["up"]["weight"].T)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["weight"])
    assert len(tensors) == 3 + 3 * 9


def test_round_trip_is_identical(exported, params, tmp_path):
    """Also where the exported tensors are transposed views, which safetensors alone would corrupt silently."""
    assert read_config(exported) == CONFIG
    again = load_params(exported, POLICY)
    same(again, params)
    export(str(tmp_path / "again"), again, POLICY, {})
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_several_files_with_an_index(params, tmp_path):
    export(str(tmp_path / "split"), params, POLICY, {}, shard_bytes=10_000)
    index = json.loads((tmp_path / "split/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "split" / name).values()) for name in files]
    assert max(sizes) <= 10_000
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in jax.tree.leaves(params))
    same(load_params(tmp_path / "split", POLICY), params)


def test_patterned_layers_and_a_tail_round_trip(tmp_path):
    policy = Policy(tiny_config(num_layers=5, pattern=CONFIG.pattern * 2))
    params = random_params(policy)
    export(str(tmp_path / "m"), params, policy, {})
    with safe_open(tmp_path / "m/model.safetensors", "np") as file:
        last = file.get_tensor("model.layers.4.mlp.down_proj.weight")
    np.testing.assert_array_equal(last, params["tail"]["mlp"]["down"]["weight"][0].T)
    same(load_params(tmp_path / "m", policy), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, params, tmp_path):
    export(str(tmp_path / "half"), params, POLICY, {}, dtype=dtype)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == dtype
    expected = jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), params)
    same(load_params(tmp_path / "half", POLICY), expected)
    kept = load_params(tmp_path / "half", POLICY, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}


def test_slices_go_straight_into_their_shards(exported, params, monkeypatch):
    """On 8 devices: the same values, each where the rules put it, and no read larger than the shard it fills."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = named_shardings(POLICY.axes(), mesh, POLICY.abstract())
    sizes = []
    whole = names.from_slice
    monkeypatch.setattr(
        "jaxpost.models.hf.load.from_slice",
        lambda weight, *rest: sizes.append((weight.path, whole(weight, *rest).size)) or whole(weight, *rest),
    )
    loaded = load_params(exported, POLICY, shardings)
    same(loaded, params)
    assert jax.tree.map(lambda p: p.sharding, loaded) == shardings
    assert {size for path, size in sizes if path == "layers/attn/q/weight"} == {16 * 4 * 8 // 4}
    assert sum(size for path, size in sizes if path == "layers/attn/q/weight") == 3 * 16 * 4 * 8  # nothing twice


# What is read from config.json


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(5e5, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, Rope(5e5, "linear", 2.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_both_spellings_of_rope(copy, change, expected):
    def spell(values):
        del values["rope_theta"], values["rope_scaling"]
        values.update(change)

    rewrite(copy, spell)
    assert read_config(copy).pattern[0].rope == expected


def test_defaults_of_old_files(copy):
    def old(values):
        for key in ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings"):
            del values[key]

    rewrite(copy, old)
    config = read_config(copy)
    assert (config.head_dim, config.num_kv_heads, config.tied) == (4, 4, False)
    assert config.pattern[0].rope == Rope(10_000.0)


def test_generation_config_says_where_to_stop(copy):
    rewrite(copy, lambda values: values.update(eos_token_id=[2, 7]), "generation_config.json")
    assert read_config(copy).eos_ids == (2, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, r"config\.json: model_type: 'mamba' is not supported; supported: llama"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling\.rope_type: 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters\.rope_type: 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor: is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, r"rope_scaling\.mscale"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0\.5"),
        ({"attention_bias": "some"}, "attention_bias: 'some' is neither true nor false"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; supported: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"vocab_size": "many"}, "vocab_size: 'many' is not a positive integer"),
        ({"hidden_size": True}, "hidden_size: True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_configs_that_are_refused(copy, change, words):
    rewrite(copy, lambda values: values.update(change))
    with pytest.raises(CheckpointError, match=words):
        read_config(copy)


def test_missing_or_broken_config(copy):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_config(copy / "nowhere")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_config(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(copy)


# Weight files that are refused


def test_missing_tensor(copy):
    retensor(copy, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight of shape \[24, 16\] is missing"):
        load_params(copy, POLICY)


def test_wrong_shape(copy):
    retensor(copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(17, np.float32)}))
    words = r"model\.safetensors: tensor model\.norm\.weight has shape \[17\], config\.json implies \[16\]"
    with pytest.raises(CheckpointError, match=words):
        load_params(copy, POLICY)


def test_a_tensor_without_a_place_is_not_dropped_silently(copy):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
    retensor(copy, lambda tensors: tensors.update(bias))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias has no place"):
        load_params(copy, POLICY)


def test_integer_weights(copy):
    retensor(copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has type I8"):
        load_params(copy, POLICY)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(copy, keep):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        load_params(copy, POLICY)


def test_missing_files(copy):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load_params(copy, POLICY)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        load_params(copy, POLICY)


# Export


def test_an_export_takes_the_place_of_an_older_one_only_when_it_is_whole(copy, params, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxpost.models.hf.save.save_file", full)
        with pytest.raises(CheckpointError, match=r"model: could not be written .*No space left"):
            export(str(copy), params, POLICY, {})
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]
    export(str(copy), jax.tree.map(jnp.zeros_like, params), POLICY, {"new.txt": b"new"})
    assert not load_params(copy, POLICY)["embed"]["weight"].any()
    assert (copy / "new.txt").read_bytes() == b"new"
    assert not (copy / "tokenizer.json").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_an_export_never_replaces_something_else(params, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is not an exported model"):
        export(str(tmp_path), params, POLICY, {})
    assert (tmp_path / "thesis.tex").exists()


# Hub names


def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("no/such/folder") == "no/such/folder"


def test_a_hub_name_without_the_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/name: no such folder; .*jaxpost\[hf\]"):
        resolve("org/name")


def test_a_hub_name_is_downloaded(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: f"/cache/{name}")
    assert resolve("org/name") == "/cache/org/name"

    def offline(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/name: neither a folder here nor .*: no network$"):
        resolve("org/name")
