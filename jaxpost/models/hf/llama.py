"""Llama 2, 3, 3.1-3.3 (arXiv:2307.09288, arXiv:2407.21783)."""

from typing import Any

from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.hf.keys import Keys, rope_keys
from jaxpost.models.hf.names import Weight

ARCHITECTURE = "LlamaForCausalLM"


def read(keys: Keys) -> ModelConfig:
    keys.require("hidden_act", "silu")
    keys.require("attention_bias", False)
    keys.require("mlp_bias", False)
    keys.require("partial_rotary_factor", 1)
    heads, embed = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if keys.values.get("head_dim") is None and embed % heads:
        raise keys.error("num_attention_heads", f"{heads} does not divide hidden_size {embed}")
    return ModelConfig(
        family="llama",
        vocab_size=keys.integer("vocab_size"),
        embed_dim=embed,
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=keys.integer("head_dim", embed // heads),
        mlp_dim=keys.integer("intermediate_size"),
        max_positions=keys.integer("max_position_embeddings", 2048),
        tied=keys.flag("tie_word_embeddings", False),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        pattern=(Layer(keys.rope()),),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **rope_keys(config.pattern[0].rope, config.max_positions),
    }


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    layer = "model.layers.{layer}."
    head = () if config.tied else (Weight("lm_head.weight", "head/weight", "V D -> V D"),)
    return (
        Weight("model.embed_tokens.weight", "embed/weight", "V D -> V D"),
        Weight(layer + "input_layernorm.weight", "layers/attn_norm/scale", "D -> D"),
        Weight(layer + "self_attn.q_proj.weight", "layers/attn/q/weight", "(H h) D -> D H h"),
        Weight(layer + "self_attn.k_proj.weight", "layers/attn/k/weight", "(K h) D -> D K h"),
        Weight(layer + "self_attn.v_proj.weight", "layers/attn/v/weight", "(K h) D -> D K h"),
        Weight(layer + "self_attn.o_proj.weight", "layers/attn/o/weight", "D (H h) -> H h D"),
        Weight(layer + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "D -> D"),
        Weight(layer + "mlp.gate_proj.weight", "layers/mlp/gate/weight", "F D -> D F"),
        Weight(layer + "mlp.up_proj.weight", "layers/mlp/up/weight", "F D -> D F"),
        Weight(layer + "mlp.down_proj.weight", "layers/mlp/down/weight", "D F -> F D"),
        Weight("model.norm.weight", "final_norm/scale", "D -> D"),
        *head,
    )
