"""Every family against transformers: golden/NAME.* is made by golden/make.py, beside torch."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpost.errors import CheckpointError
from jaxpost.models.hf import export, load_params, read_config
from jaxpost.models.policy import Policy
from jaxpost.ops.experts import balance_loss
from jaxpost.ops.logprobs import logits, row_logps
from jaxpost.types import Rows
from tests.models.golden.weights import tensors_of
from tests.models.tiny import greedy, linear_rows

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
LANGUAGE_MODELS = [name for name in NAMES if not name.endswith("_scores")]


def write_model(name, folder):
    """The checkpoint as transformers wrote it."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    save_file(tensors_of(golden["shapes"]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def open_golden(name, folder):
    """(policy, parameters, golden values) of a model."""
    policy = Policy(read_config(write_model(name, folder)), unroll=False)
    return policy, load_params(folder, policy), np.load(GOLDEN / f"{name}.npz")


def close(found, expected):
    """To 1e-5 of the largest value."""
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), rtol=0)


def quick_jit(function):
    """Compiled without LLVM's optimisations: it runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def rows_of(golden) -> Rows:
    mask = golden["mask"]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0).astype(np.int32)
    targets = mask.astype(np.float32)
    targets[:, 0] = 0
    return Rows(golden["ids"], mask, np.zeros_like(mask), positions, targets)


def forward(policy, rows, params):
    """The loss of golden/make.py, and (hidden states, router logits, NLL, auxiliary loss)."""
    hidden, router = policy.hidden(params, rows)
    stats = row_logps(hidden, policy.head(params), rows)
    nll, aux = -stats.logps.sum() / rows.weights.sum(), jnp.float32(0)
    if router is not None:
        aux = balance_loss(router, policy.config.experts.top_k, jnp.asarray(rows.segments, jnp.float32))
    return nll + 0.5 * aux, (hidden, router, nll, aux)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_equals_transformers(name, tmp_path):
    """Logits, router logits, losses and the norm of all gradients, f32."""
    policy, params, golden = open_golden(name, tmp_path / name)
    step = quick_jit(jax.value_and_grad(lambda p: forward(policy, rows_of(golden), p), has_aux=True))
    (_, (hidden, router, nll, aux)), grads = step(params)
    real = golden["mask"] == 1
    close(logits(hidden[real], policy.head(params)), golden["logits"][real])
    np.testing.assert_allclose(nll, golden["nll"], rtol=1e-5)
    norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, golden["grad_norm"], rtol=2e-5)
    if router is not None or "router_logits" in golden.files:
        close(router[:, real], golden["router_logits"][:, real])
        np.testing.assert_allclose(aux, golden["aux_loss"], rtol=1e-5)


QUICK = ("gemma3", "qwen3_moe_mixed")  # windows, a mixture of experts


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGE_MODELS if name not in QUICK)]
)
def test_decoding_continues_like_transformers_with_the_logps_of_training(name, tmp_path):
    policy, params, golden = open_golden(name, tmp_path / name)
    prompt = golden["ids"][0][golden["mask"][0] == 1]
    [completion] = greedy(policy, params, [prompt], len(golden["greedy"]))
    np.testing.assert_array_equal(completion.tokens, golden["greedy"])
    whole = linear_rows([np.concatenate([prompt, completion.tokens])], len(prompt) + len(completion.tokens))
    stats = row_logps(policy.hidden(params, whole)[0], policy.head(params), whole)
    np.testing.assert_allclose(completion.logps, stats.logps[0, len(prompt) :], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_scores", "gemma3_scores"])
def test_scores_equal_transformers(name, tmp_path):
    policy, params, golden = open_golden(name, tmp_path / name)
    scores = policy.scores(params, policy.hidden(params, rows_of(golden))[0])
    last = golden["mask"].sum(axis=1) - 1
    close(scores[np.arange(len(last)), last], golden["scores"])


@pytest.mark.parametrize("name", NAMES)
def test_export_is_what_came_in(name, tmp_path):
    """The same tensors to the bit, a config that reads the same, and again the same bytes from there."""
    policy, params, _ = open_golden(name, tmp_path / name)
    export(str(tmp_path / "out"), params, policy, {})
    assert read_config(tmp_path / "out") == policy.config
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == json.loads((GOLDEN / f"{name}.json").read_text())["config"]["architectures"]
    again = load_params(tmp_path / "out", policy)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    export(str(tmp_path / "again"), again, policy, {})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


LEGACY_GEMMA3 = {
    "rope_parameters": None,
    "rope_theta": 2000.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "layer_types": None,
    "sliding_window_pattern": 2,
}


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("gemma3", LEGACY_GEMMA3),
        ("gemma2", {"rope_parameters": None, "layer_types": None, "hidden_act": "gelu_pytorch_tanh"}),
        ("mixtral", {"rope_parameters": None, "rope_theta": 1e6}),
        ("qwen2_windows", {"rope_parameters": None, "rope_theta": 10_000.0, "layer_types": None}),
        ("qwen3_moe", {"num_local_experts": None, "num_experts": 6}),
        ("qwen3", {"rope_parameters": None, "rope_theta": 10_000.0, "layer_types": None}),
    ],
)
def test_older_spellings_read_the_same(name, older, tmp_path):
    folder = write_model(name, tmp_path / name)
    expected, values = read_config(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (values | older).items() if v is not None}))
    assert read_config(folder) == expected


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("mistral", {"sliding_window": "long"}, "sliding_window: 'long' is not a positive integer"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
        ("qwen2", {"layer_types": ["full_attention"]}, "not a list of num_hidden_layers 3 types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window: is missing"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_parameters\.rope_type: 'yarn'"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation: 'relu' is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0 is not supported"),
        ("gemma3", {"model_type": "gemma3"}, "model_type: 'gemma3' is not supported; supported: .*gemma3_text"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            r"rope_parameters\.full_attention\.rope_type: 'dynamic'",
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise: 0.1 is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is more than num_local_experts 4"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers: .*leaves no mixture of experts"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers: 'all' is not a list of layer numbers"),
        ("qwen2_scores", {"architectures": ["Qwen2ForTokenClassification"]}, "architectures.*Qwen2ForSequenceClass"),
    ],
)
def test_features_that_are_refused_by_name(name, change, words, tmp_path):
    folder = write_model(name, tmp_path / name)
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        read_config(folder)
