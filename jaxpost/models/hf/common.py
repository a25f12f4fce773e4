"""What the families share: keys of config.json that mean the same, and tensors of the same names."""

from typing import Any

from jaxpost.models.config import Experts, Layer, ModelConfig, shortest_pattern
from jaxpost.models.hf.keys import Keys, rope_keys
from jaxpost.models.hf.names import Weight
from jaxpost.ops.rope import Rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs -> ours
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_ACTIVATION = "hidden_activation"
ATTENTION, DENSE = ("q", "k", "v", "o"), ("gate", "up", "down")


def read(
    keys: Keys,
    layers: tuple[Layer, ...],
    *,
    activation: str = "hidden_act",
    default_activation: str = "silu",
    **given: Any,
) -> ModelConfig:
    """The ModelConfig of these layers; `given` are fields that the family reads by itself.

    activation: the key that names it.
    """
    keys.require("partial_rotary_factor", 1)
    heads, embed = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if "head_dim" not in given and keys.values.get("head_dim") is None and embed % heads:
        raise keys.error("num_attention_heads", f"{heads} does not divide hidden_size {embed}")
    keys.require(activation, *ACTIVATIONS)
    values = {
        "family": keys.values["model_type"],
        "vocab_size": keys.integer("vocab_size"),
        "embed_dim": embed,
        "num_layers": len(layers),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": keys.integer("head_dim", embed // heads),
        "mlp_dim": keys.integer("intermediate_size"),
        "max_positions": keys.integer("max_position_embeddings", 2048),
        "tied": keys.flag("tie_word_embeddings", False),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "pattern": shortest_pattern(layers),
        "activation": ACTIVATIONS[keys.values.get(activation) or default_activation],
        "bos_id": keys.token_id("bos_token_id"),
        "eos_ids": keys.token_ids("eos_token_id"),
        "pad_id": keys.token_id("pad_token_id"),
    }
    return ModelConfig(**values | given)


def attention_bias(keys: Keys) -> tuple[str, ...]:
    return ATTENTION if keys.flag("attention_bias", False) else ()


def uniform(keys: Keys, rope: Rope, window: int | None = None) -> tuple[Layer, ...]:
    """All layers alike."""
    return (Layer(rope, window),) * keys.integer("num_hidden_layers")


def read_experts(keys: Keys, mlp_dim: int, normalized: bool) -> Experts:
    """Their number is `num_local_experts`, or `num_experts` in files that an older transformers wrote for Qwen."""
    count = "num_local_experts" if "num_experts" not in keys.values else "num_experts"
    number, top_k = keys.integer(count), keys.integer("num_experts_per_tok")
    if top_k > number:
        raise keys.error("num_experts_per_tok", f"{top_k} is more than {count} {number}")
    return Experts(number, top_k, mlp_dim, normalized, keys.weight("router_aux_loss_coef", 0.001))


def layer_windows(keys: Keys, default: list[str], window: int | None) -> list[int | None]:
    """The window of each layer by `layer_types`; `default` are the types where the file names none."""
    types = keys.values.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, list) or len(types) != len(default):
        raise keys.error("layer_types", f"{types!r} is not a list of num_hidden_layers {len(default)} types")
    if unknown := sorted({str(kind) for kind in types} - {SLIDING, FULL}):
        raise keys.error("layer_types", f"{unknown[0]!r} is not supported; supported: {SLIDING}, {FULL}")
    if window is None and SLIDING in types:
        raise keys.error("sliding_window", f"is missing, but layer_types names {SLIDING}")
    return [window if kind == SLIDING else None for kind in types]


def layer_types(config: ModelConfig) -> list[str]:
    return [FULL if layer.window is None else SLIDING for layer in config.layers]


def qwen_layers(keys: Keys) -> tuple[Layer, ...]:
    """Qwen 2 and 3: where `use_sliding_window` is set, the layers from `max_window_layers` on have a window."""
    count, rope = keys.integer("num_hidden_layers"), keys.rope()
    window = keys.integer("sliding_window", 4096) if keys.flag("use_sliding_window", False) else None
    first = keys.count("max_window_layers", 28)
    default = [SLIDING if window is not None and i >= first else FULL for i in range(count)]
    return tuple(Layer(rope, window) for window in layer_windows(keys, default, window))


def qwen_window_keys(config: ModelConfig) -> dict[str, Any]:
    windows = [layer.window for layer in config.layers]
    if not any(windows):
        return {"use_sliding_window": False, "sliding_window": None, "layer_types": layer_types(config)}
    first = next(i for i, window in enumerate(windows) if window)
    return {
        "use_sliding_window": True,
        "sliding_window": windows[first],
        "max_window_layers": first,
        "layer_types": layer_types(config),
    }


def write(config: ModelConfig, activation: str = "hidden_act") -> dict[str, Any]:
    theirs = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
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
        activation: theirs[config.activation],
        **rope_keys(config.pattern[0].rope, config.max_positions),
    }


def read_gemma(keys: Keys, layers: tuple[Layer, ...], **given: Any) -> ModelConfig:
    """Gemma 2 and 3: what they have in common beyond `read`."""
    keys.require("use_bidirectional_attention", False)
    return read(
        keys,
        layers,
        activation=GEMMA_ACTIVATION,
        default_activation="gelu_pytorch_tanh",
        biased=attention_bias(keys),
        head_dim=keys.integer("head_dim", 256),
        tied=keys.flag("tie_word_embeddings", True),
        post_norms=True,
        unit_offset=True,
        scaled_embedding=True,
        attention_scalar=keys.number("query_pre_attn_scalar", 256),
        **given,
    )


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    window = next((layer.window for layer in config.pattern if layer.window is not None), None)
    return write(config, GEMMA_ACTIVATION) | {
        "attention_bias": "q" in config.biased,
        "query_pre_attn_scalar": config.attention_scalar,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": window,
        "layer_types": layer_types(config),
    }


def norms(**names: str) -> tuple[Weight, ...]:
    """Norms of a layer: our name -> theirs."""
    return tuple(
        Weight(f"model.layers.{{layer}}.{theirs}.weight", f"layers/{ours}/scale", "D -> D")
        for ours, theirs in names.items()
    )


PRE_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def weights(config: ModelConfig, layer_norms: dict[str, str] = PRE_NORMS) -> tuple[Weight, ...]:
    """Everything but mixtures of experts."""
    found = [
        Weight("model.embed_tokens.weight", "embed/weight", "V D -> V D"),
        *norms(**layer_norms),
        *_linears("self_attn", "attn", ATTENTION_DIMS, config),
        Weight("model.norm.weight", "final_norm/scale", "D -> D"),
    ]
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found.append(
                Weight(f"model.layers.{{layer}}.self_attn.{name}.weight", f"layers/attn/{name}/scale", "h -> h")
            )
    if not all(layer.experts for layer in config.layers):
        found += _linears("mlp", "mlp", MLP_DIMS, config)
    if config.num_scores:
        found.append(Weight("score.weight", "score/weight", "R D -> R D"))
    elif not config.tied:
        found.append(Weight("lm_head.weight", "head/weight", "V D -> V D"))
    return tuple(found)


ATTENTION_DIMS = {
    "q": "(H h) D -> D H h",
    "k": "(K h) D -> D K h",
    "v": "(K h) D -> D K h",
    "o": "D (H h) -> H h D",
}
MLP_DIMS = {"gate": "F D -> D F", "up": "F D -> D F", "down": "D F -> F D"}
BIAS_DIMS = {"q": "(H h) -> H h", "k": "(K h) -> K h", "v": "(K h) -> K h", "o": "D -> D"}
BIAS_DIMS |= {"gate": "F -> F", "up": "F -> F", "down": "D -> D"}


def _linears(theirs: str, ours: str, dims: dict[str, str], config: ModelConfig) -> list[Weight]:
    found = []
    for name, shape in dims.items():
        tensor, path = f"model.layers.{{layer}}.{theirs}.{name}_proj", f"layers/{ours}/{name}"
        found.append(Weight(f"{tensor}.weight", f"{path}/weight", shape))
        if name in config.biased:
            found.append(Weight(f"{tensor}.bias", f"{path}/bias", BIAS_DIMS[name]))
    return found


def expert_weights(router: str, experts: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """A layer's mixture of experts; `router` and `experts` are modules of the layer, the rest names in an expert."""
    layer = "model.layers.{layer}."
    dims = {"gate": (gate, "f D -> D f"), "up": (up, "f D -> D f"), "down": (down, "D f -> f D")}
    return (
        Weight(f"{layer}{router}.weight", "layers/moe/router/weight", "E D -> D E"),
        *(
            Weight(f"{layer}{experts}.{{expert}}.{name}.weight", f"layers/moe/{ours}/weight", shape)
            for ours, (name, shape) in dims.items()
        ),
    )
