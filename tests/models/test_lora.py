"""Adapters and quantised bases inside the decoder: identities, and the plain model that computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpost.errors import ConfigError
from jaxpost.models import lora, quantize
from jaxpost.models.lora import Lora
from jaxpost.models.policy import Policy
from tests.models.tiny import (
    experts_config,
    linear_rows,
    patterned_config,
    random_documents,
    random_params,
    tiny_config,
)

ROWS = linear_rows(random_documents(9, 5), 16)
ALL = ("attn/", "mlp/")
SETTINGS = {
    "plain": Lora(4, 8.0, ALL),
    "some": Lora(2, 3.0, ("attn/[qv]$",)),
    "rslora": Lora(4, 8.0, ALL, rslora=True),
    "dora": Lora(3, 6.0, ("attn/o", "mlp/"), dora=True),
}


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())), rtol=0)


def hidden(policy, params, key=None):
    return jax.jit(lambda params: policy.hidden(params, ROWS, key)[0])(params)


def adapted(settings, config=None, fresh=False):
    """(policy, base, adapters): random ones, or as a run begins."""
    policy = Policy(config or patterned_config(), lora=settings, unroll=False)
    base, adapters = lora.split(random_params(policy))
    if fresh:
        adapters = lora.fresh(lora.split(policy.abstract())[1], base, jax.random.key(0))
        adapters = lora.with_magnitudes(adapters, base)
    return policy, base, adapters


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_weights_compute_the_same(name):
    policy, base, adapters = adapted(SETTINGS[name])
    params = lora.joined(base, adapters)
    plain = Policy(patterned_config(), unroll=False)
    merged = lora.merged(params, SETTINGS[name])
    assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract())
    close(hidden(plain, merged), hidden(policy, params))
    assert np.abs(hidden(plain, base) - hidden(policy, params)).max() > 0.1


def test_the_product_by_hand():
    """alpha / rank * x A B beside x W, of one product."""
    settings = Lora(2, 6.0, ("mlp/gate",))
    _, base, adapters = adapted(settings, tiny_config())
    layer = {**base["layers"]["mlp"]["gate"], **adapters["layers"]["mlp"]["gate"]}
    whole = layer["weight"][1] + 3.0 * layer["lora_a"][1] @ layer["lora_b"][1]
    close(lora.merged(lora.joined(base, adapters), settings)["layers"]["mlp"]["gate"]["weight"][1], whole)
    assert set(adapters["layers"]) == {"mlp"} and set(adapters["layers"]["mlp"]) == {"gate"}


@pytest.mark.parametrize(("name", "exact"), [("plain", True), ("dora", False)])
def test_a_new_adapter_changes_nothing(name, exact):
    """To the bit; with DoRA to rounding."""
    policy, base, adapters = adapted(SETTINGS[name], fresh=True)
    plain = hidden(Policy(patterned_config(), unroll=False), base)
    found = hidden(policy, lora.joined(base, adapters))
    np.testing.assert_array_equal(found, plain) if exact else close(found, plain)
    a = adapters["layers"]["mlp"]["down"]["lora_a"]
    np.testing.assert_allclose(a.std(), 1 / np.sqrt(3 * a.shape[1]), rtol=0.2)  # as PEFT draws it


def test_dropout_is_of_the_adapters_alone():
    settings = Lora(4, 8.0, ALL, dropout=0.5)
    policy, base, adapters = adapted(settings)
    params, keys = lora.joined(base, adapters), jax.random.split(jax.random.key(1), 2)
    found = [hidden(policy, params, key) for key in (*keys, keys[0])]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 0.01
    close(hidden(policy, params), hidden(Policy(patterned_config(), lora=SETTINGS["plain"], unroll=False), params))
    zero = jax.tree.map(jnp.zeros_like, adapters)
    close(hidden(policy, lora.joined(base, zero), keys[0]), hidden(Policy(patterned_config(), unroll=False), base))


def test_targets():
    lora.check_targets(Lora(2, 2.0, ("q$", "mlp/")), tiny_config())
    with pytest.raises(ConfigError, match=r"lora\.targets: 'q_proj' matches none of attn/q, .*mlp/down"):
        lora.check_targets(Lora(2, 2.0, ("attn/v", "q_proj")), tiny_config())
    with pytest.raises(ConfigError, match=r"lora\.targets: '\(' is not a regular expression"):
        lora.check_targets(Lora(2, 2.0, ("(",)), tiny_config())
    with pytest.raises(ConfigError, match=r"lora\.targets: empty"):
        lora.check_targets(Lora(2, 2.0, ()), tiny_config())
    only = experts_config()
    lora.check_targets(Lora(2, 2.0, ("mlp/up",)), only)  # of its dense layer


# Quantised weights

KINDS = {"int8": quantize.from_int8, "nf4": quantize.from_nf4}


@pytest.mark.parametrize("shape", [(128, 3), (96, 2, 4), (24, 5), (6,)])
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_quantised_weight(kind, shape):
    """At most half a step of the block's scale: 1/254 of its largest entry, or half the widest gap of NF4 (0.152)."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values, scale = quantize.QUANTIZERS[kind](weight)
    block = quantize.block_of(shape[0])
    assert scale.shape == (shape[0] // block, *shape[1:])
    found = np.asarray(KINDS[kind](values, scale, "float32"))
    largest = np.abs(weight.reshape(-1, block, *shape[1:])).max(axis=1, keepdims=True)
    bound = {"int8": 0.5 / 127, "nf4": (0.6961928009986877 - 1.0) / -2}[kind]
    error = np.abs(found - weight).reshape(-1, block, *shape[1:]) / largest
    assert error.max() <= bound + 1e-6
    assert values.nbytes == weight.size // (1 if kind == "int8" else 2)


def test_nf4_by_a_loop():
    weight = np.array([[0.5, -2.0, 0.0, 1.9, -0.1, 0.33, 2.0, -1.0]], np.float32).T
    values, scale = quantize.to_nf4(weight)
    expected = [quantize.NF4[np.abs(quantize.NF4 - w / 2.0).argmin()] * 2.0 for w in weight[:, 0]]
    np.testing.assert_allclose(quantize.from_nf4(values, scale, "float32")[:, 0], expected, rtol=1e-6)


def test_a_zero_block_stays_zero():
    for kind, read in KINDS.items():
        np.testing.assert_array_equal(read(*quantize.QUANTIZERS[kind](np.zeros((8, 2))), "float32"), np.zeros((8, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_computes_with_its_dequantised_weights(kind):
    settings = SETTINGS["plain"]
    policy, base, adapters = adapted(settings)
    keep = quantize.quantizer(kind, lora.modules_of(patterned_config()))
    small = unflatten_dict({k: v for path, leaf in flatten_dict(base).items() for k, v in keep(path, leaf).items()})
    assert set(small["layers"]["attn"]["q"]) == {f"weight_{kind}", f"weight_{kind}_scale"}
    np.testing.assert_array_equal(small["embed"]["weight"], base["embed"]["weight"])
    read = jax.vmap(functools.partial(KINDS[kind], dtype="float32"))
    plain = jax.tree.map(lambda leaf: leaf, base)
    for stack in ("layers", "tail"):
        for group in ("attn", "mlp"):
            for name, leaves in small[stack][group].items():
                plain[stack][group][name]["weight"] = read(*leaves.values())
    found = hidden(policy, lora.joined(small, adapters))
    close(found, hidden(policy, lora.joined(plain, adapters)))
    close(found, hidden(Policy(patterned_config(), unroll=False), lora.merged(lora.joined(small, adapters), settings)))
    assert np.abs(found - hidden(policy, lora.joined(base, adapters))).max() > 1e-3
