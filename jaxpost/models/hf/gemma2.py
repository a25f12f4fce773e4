"""Gemma 2 (arXiv:2408.00118): soft caps, windows in every other layer, norms before and after attention and MLP."""

from typing import Any

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "Gemma2ForCausalLM"


def read(keys: Keys) -> ModelConfig:
    count, rope = keys.integer("num_hidden_layers"), keys.rope()
    types = [common.FULL if i % 2 else common.SLIDING for i in range(count)]
    windows = common.layer_windows(keys, types, keys.optional("sliding_window", keys.integer, 4096))
    return common.read_gemma(
        keys,
        tuple(Layer(rope, window) for window in windows),
        attention_soft_cap=keys.optional("attn_logit_softcapping", keys.number, 50.0),
        logit_soft_cap=keys.optional("final_logit_softcapping", keys.number, 30.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write_gemma(config) | {"attn_logit_softcapping": config.attention_soft_cap}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config, common.GEMMA_NORMS)
