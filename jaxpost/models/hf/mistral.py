"""Mistral (arXiv:2310.06825): Llama with a sliding window, which versions after 0.1 switch off."""

from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "MistralForCausalLM"


def read(keys: Keys) -> ModelConfig:
    keys.require("layer_types")
    window = keys.optional("sliding_window", keys.integer, 4096)
    return common.read(keys, common.uniform(keys, keys.rope(), window))


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write(config) | {"sliding_window": config.pattern[0].window}


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config)
