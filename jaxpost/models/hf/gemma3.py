"""Gemma 3, text (arXiv:2503.19786): five layers with a window and a RoPE of their own to one without."""

from typing import Any

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys, rope_keys
from jaxpost.models.hf.names import Weight
from jaxpost.ops.rope import Rope

ARCHITECTURE = "Gemma3ForCausalLM"
SCORE_ARCHITECTURE = "Gemma3TextForSequenceClassification"
THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def read(keys: Keys) -> ModelConfig:
    keys.require("attn_logit_softcapping")
    count = keys.integer("num_hidden_layers")
    period = keys.integer("sliding_window_pattern", 6)
    types = [common.SLIDING if (i + 1) % period else common.FULL for i in range(count)]
    windows = common.layer_windows(keys, types, keys.optional("sliding_window", keys.integer, 4096))
    full, local = _ropes(keys)
    return common.read_gemma(
        keys,
        tuple(Layer(full) if window is None else Layer(local, window) for window in windows),
        qk_norm=True,
        logit_soft_cap=keys.optional("final_logit_softcapping", keys.number, None),
    )


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """Of the layers without a window, and of those with one."""
    newer = keys.inside("rope_parameters")
    if common.FULL in newer.values or common.SLIDING in newer.values:
        full, local = (newer.inside(name) for name in (common.FULL, common.SLIDING))
        return full.rope_parameters(THETA), local.rope_parameters(LOCAL_THETA)
    return keys.rope(THETA), Rope(keys.number("rope_local_base_freq", LOCAL_THETA))


def write(config: ModelConfig) -> dict[str, Any]:
    ropes = {layer.window is None: layer.rope for layer in config.pattern}
    full, local = ropes.get(True, Rope(THETA)), ropes.get(False, Rope(LOCAL_THETA))
    return common.write_gemma(config) | rope_keys(full, config.max_positions) | {"rope_local_base_freq": local.theta}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config, common.GEMMA_NORMS)
