"""Qwen 3 with mixtures of experts (arXiv:2505.09388), in all layers or in some."""

from typing import Any

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf import common
from jaxpost.models.hf.keys import Keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "Qwen3MoeForCausalLM"


def read(keys: Keys) -> ModelConfig:
    every, dense = keys.integer("decoder_sparse_step", 1), keys.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise keys.error("mlp_only_layers", f"{dense!r} is not a list of layer numbers")
    window = keys.optional("sliding_window", keys.integer, 4096) if keys.flag("use_sliding_window", False) else None
    count, rope = keys.integer("num_hidden_layers"), keys.rope()
    layers = tuple(Layer(rope, window, i not in dense and (i + 1) % every == 0) for i in range(count))
    if not any(layer.experts for layer in layers):
        raise keys.error("mlp_only_layers", "with decoder_sparse_step leaves no mixture of experts; that is a qwen3")
    mlp_dim, normalized = keys.integer("moe_intermediate_size", 768), keys.flag("norm_topk_prob", False)
    return common.read(
        keys,
        layers,
        biased=common.attention_bias(keys),
        qk_norm=True,
        experts=common.read_experts(keys, mlp_dim, normalized),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    window = config.pattern[0].window
    return common.write(config) | {
        "attention_bias": "q" in config.biased,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if not layer.experts],
        "num_experts": config.experts.count,
        "num_experts_per_tok": config.experts.top_k,
        "moe_intermediate_size": config.experts.mlp_dim,
        "norm_topk_prob": config.experts.normalized,
        "router_aux_loss_coef": config.experts.loss_weight,
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    names = ("gate_proj", "up_proj", "down_proj")
    return common.weights(config) + common.expert_weights("mlp.gate", "mlp.experts", *names)
