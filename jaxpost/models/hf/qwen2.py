"""Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): biases on queries, keys and values."""

from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "Qwen2ForCausalLM"


def read(keys: Keys) -> ModelConfig:
    return common.read(keys, common.qwen_layers(keys), biased=("q", "k", "v"))


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write(config) | common.qwen_window_keys(config)


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config)
