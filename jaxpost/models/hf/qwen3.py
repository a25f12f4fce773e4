"""Qwen 3 (arXiv:2505.09388): queries and keys are normalised per head."""

from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "Qwen3ForCausalLM"


def read(keys: Keys) -> ModelConfig:
    return common.read(
        keys,
        common.qwen_layers(keys),
        biased=common.attention_bias(keys),
        qk_norm=True,
        head_dim=keys.integer("head_dim", 128),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write(config) | common.qwen_window_keys(config) | {"attention_bias": "q" in config.biased}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config)
