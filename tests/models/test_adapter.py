"""Models of somebody else's: what the adapter computes equals our own packed rows, and DPO trains them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpost
from jaxpost.data.rows import build_batch
from jaxpost.errors import ConfigError
from jaxpost.models.adapter import Adapter, ForeignConfig, from_linen, from_nnx
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import logits
from jaxpost.types import Document, Origin, Rows
from tests.models.tiny import random_params, tiny_config
from tests.worlds import dpo_config, write_model, write_pairs

VOCABULARY, CONTEXT = 48, 16


def documents(branching: bool) -> list[list[Document]]:
    """Two rows of several documents: three completions at most, or linear ones."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, VOCABULARY, n).astype(np.int32)  # noqa: E731

    def one(i, prompt, *sizes):
        completions = tuple(map(draw, sizes))
        weights = tuple((rng.random(len(c)) < 0.8).astype(np.float32) for c in completions)
        return Document(draw(prompt), completions, weights, i, Origin("f", 1))

    if branching:
        return [[one(0, 4, 3, 5), one(1, 1, 2, 2, 4)], [one(2, 6, 1, 7)]]
    return [[one(0, 0, 9), one(1, 0, 4)], [one(2, 0, 14)]]


@pytest.mark.parametrize("branching", [True, False])
@pytest.mark.parametrize("head", [True, False], ids=["hidden", "logits"])
def test_equals_our_own_packed_rows(branching, head):
    """Our own decoder as if it were foreign: it sees plain sequences only. Values and gradients, f32."""
    policy = Policy(tiny_config(num_layers=1))
    params = random_params(policy)
    sizes = dict(rows_per_step=3, tokens_per_row=32, documents_per_row=4, branches=3 if branching else 0)
    batch = build_batch(documents(branching), **sizes)

    def apply(params, tokens, positions):
        rows = Rows(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), positions, None)
        hidden, _ = policy.hidden(params, rows)
        if head:
            return hidden
        return logits(hidden.reshape(-1, hidden.shape[-1]), policy.head(params)).reshape(*tokens.shape, -1)

    foreign = Adapter(apply, params, ForeignConfig(VOCABULARY, CONTEXT), policy.head if head else None)

    def values(model):
        def total(params):
            stats, _ = model.token_stats(params, batch, chunk=64)
            return (stats.logps * batch.rows.weights).sum() + 0.1 * stats.entropy.sum(), stats

        (_, stats), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return stats, grads

    for ours, theirs in zip(jax.tree.leaves(values(policy)), jax.tree.leaves(values(foreign)), strict=True):
        np.testing.assert_allclose(theirs, ours, atol=2e-5, rtol=1e-5)
    assert batch.rows.weights.sum() > 10


class Attention(nnx.Module):
    """One causal layer with learned positions, in the words of its own author."""

    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(128, width, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embed(tokens) + self.places(positions)
        return self.out(x + self.attend(x, mask=nn.make_causal_mask(tokens)))


class LinenModel(nn.Module):
    """A causal mean over what came before."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens, positions):
        x = nn.Embed(self.vocabulary, 16)(tokens)
        x = jnp.cumsum(x, axis=1) / (positions[..., None] + 1.0)
        return nn.Dense(self.vocabulary)(nn.gelu(x))


def build_nnx(path):
    return from_nnx(Attention(1144, 16, nnx.Rngs(0)), vocab_size=1144, max_positions=128)


def build_linen(path):
    module = LinenModel(1144)
    zeros = jnp.zeros((1, 2), jnp.int32)
    return from_linen(
        module, module.init(jax.random.key(0), zeros, zeros)["params"], vocab_size=1144, max_positions=128
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return write_model(folder / "model"), write_pairs(folder / "pairs.jsonl", 30)


@pytest.mark.parametrize("build", ["build_nnx", "build_linen"])
def test_dpo_trains_a_foreign_model(build, given, tmp_path):
    """From a config, with a cached reference: ln 2 at first, then the loss falls. `given` supplies the tokenizer."""
    config = dpo_config(*given, tmp_path / "run")
    config["model"]["adapter"] = f"tests.models.test_adapter:{build}"
    config["data"]["eval_examples"] = 0
    config["optimizer"]["learning_rate"] = 0.02
    run = jaxpost.run(config)
    losses = [row["loss"] for row in run.rows if "loss" in row]
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-5)
    assert losses[-1] < 0.6
    with pytest.raises(ConfigError, match=r"model\.adapter: somebody else's model only trains"):
        run.chat("hello")
    with pytest.raises(ConfigError, match=r"model\.adapter: .*no Hugging Face layout"):
        run.export(tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"adapter": "tests.models.nothing:build"}, r"model\.adapter: cannot import 'tests\.models\.nothing"),
        ("run", {"export": True}, r"run\.export: True, but a model of model\.adapter only trains; set False"),
        ("run", {"eval_prompts": 2}, r"run\.eval_prompts: 2, but .*; set 0"),
        ("mesh", {"expert": 8, "fsdp": 1}, r"mesh\.expert: 8, but a model of the family foreign has no experts"),
    ],
)
def test_what_a_foreign_model_cannot_do_is_said_first(section, values, words, given, tmp_path):
    config = dpo_config(*given, tmp_path / "run")
    config["model"]["adapter"] = "tests.models.test_adapter:build_linen"
    config.setdefault(section, {}).update(values)
    with pytest.raises(ConfigError, match=words):
        jaxpost.run(config)
