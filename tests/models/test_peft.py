"""Adapters in the layout of PEFT: golden/adapters/NAME.* is made by the make.py beside them, with PEFT itself."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost.errors import CheckpointError
from jaxpost.models import lora
from jaxpost.models.hf import export_adapter, load_adapter, read_adapter
from jaxpost.ops.logprobs import logits
from jaxpost.types import Rows
from tests.models.golden.weights import tensors_of
from tests.models.test_families import close, open_golden, quick_jit

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapters"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def write_adapter(name, folder, **changes):
    """The adapter as PEFT wrote it; `changes`: of its config."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(golden["config"] | changes))
    save_file(tensors_of(golden["shapes"]), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def open_adapter(name, tmp_path):
    """(policy with the adapter's settings, its base, folder, golden values)."""
    base = json.loads((GOLDEN / f"{name}.json").read_text())["base"]
    plain, params, _ = open_golden(base, tmp_path / "base")
    folder = write_adapter(name, tmp_path / "adapter")
    policy = plain.__class__(plain.config, lora=read_adapter(folder, plain.config), unroll=False)
    return policy, params, folder, np.load(GOLDEN / f"{name}.npz")


def loaded(policy, folder):
    abstract = lora.split(policy.abstract())[1]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_adapter(folder, policy, abstract, jax.tree.map(lambda _: place, abstract))


@pytest.mark.parametrize("name", NAMES)
def test_equals_peft(name, tmp_path):
    """Logits with the adapter; what is written again is the same tensors, and settings that read the same."""
    policy, params, folder, golden = open_adapter(name, tmp_path)
    adapters, ids = loaded(policy, folder), golden["ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    rows = Rows(ids, ones, zeros, positions, ones.astype(np.float32))
    params = lora.joined(params, adapters)
    hidden = quick_jit(lambda params: policy.hidden(params, rows)[0])(params)
    if policy.config.num_scores:
        close(policy.scores(params, hidden[:, -1:])[:, 0], golden["logits"])
    else:
        found = logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params))
        close(found.reshape(golden["logits"].shape), golden["logits"])
    export_adapter(tmp_path / "again", adapters, policy, "base", {"note.txt": b"a file more"})
    files = [load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    for tensor, value in files[0].items():
        np.testing.assert_array_equal(files[1][tensor], value)
    assert read_adapter(tmp_path / "again", policy.config) == policy.lora
    assert (tmp_path / "again" / "note.txt").read_bytes() == b"a file more"


FAULTS = {
    "peft_type": ("IA3", "'IA3' is not supported; supported: 'LORA'"),
    "rank_pattern": ({"q_proj": 8}, "{'q_proj': 8} is not supported"),
    "use_bdlora": (True, "True is not supported"),
    "modules_to_save": (["score"], r"\['score'\] is not supported; of this model None is"),
    "bias": ("all", "'all' is not supported"),
    "init_lora_weights": ("pissa", "'pissa' changes the base"),
    "target_modules": (["q_proj", "lm_head"], r"\['q_proj', 'lm_head'\] is not a list of some of q_proj, k_proj"),
    "r": (None, ""),
}


@pytest.mark.parametrize("key", FAULTS)
def test_what_is_not_supported_is_refused_by_name(key, tmp_path):
    policy, _, _, _ = open_adapter("plain", tmp_path)
    value, reason = FAULTS[key]
    folder = write_adapter("plain", tmp_path / "faulty", **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json.*{key}.*{reason}"):
        read_adapter(folder, policy.config)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    policy, _, _, _ = open_adapter("plain", tmp_path)
    folder = write_adapter("rslora", tmp_path / "other")
    other = policy.__class__(policy.config, lora=read_adapter(folder, policy.config))
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: tensor .* has shape"):
        loaded(other, folder)
    with pytest.raises(CheckpointError, match=r"no_such: holds no adapter_config.json"):
        read_adapter(tmp_path / "no_such", policy.config)
