"""Llama 2, 3, 3.1-3.3 (arXiv:2307.09288, arXiv:2407.21783)."""

from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "LlamaForCausalLM"


def read(keys: Keys) -> ModelConfig:
    biased = common.attention_bias(keys) + (common.DENSE if keys.flag("mlp_bias", False) else ())
    return common.read(keys, common.uniform(keys, keys.rope()), biased=biased)


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write(config) | {"attention_bias": "q" in config.biased, "mlp_bias": "up" in config.biased}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config)
