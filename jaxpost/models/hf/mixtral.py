"""Mixtral (arXiv:2401.04088): Mistral with mixtures of experts in all layers."""

from typing import Any

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "MixtralForCausalLM"


def read(keys: Keys) -> ModelConfig:
    keys.require("router_jitter_noise", 0)
    window = keys.optional("sliding_window", keys.integer, None)
    layers = (Layer(keys.rope(1_000_000.0), window, experts=True),) * keys.integer("num_hidden_layers")
    experts = common.read_experts(keys, keys.integer("intermediate_size"), normalized=True)
    return common.read(keys, layers, experts=experts, norm_eps=keys.number("rms_norm_eps", 1e-5))


def write(config: ModelConfig) -> dict[str, Any]:
    return common.write(config) | {
        "sliding_window": config.pattern[0].window,
        "num_local_experts": config.experts.count,
        "num_experts_per_tok": config.experts.top_k,
        "router_aux_loss_coef": config.experts.loss_weight,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    return common.weights(config) + common.expert_weights(
        "block_sparse_moe.gate", "block_sparse_moe.experts", gate="w1", up="w3", down="w2"
    )
