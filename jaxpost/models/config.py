"""What a model is: everything the decoder needs, and nothing about how it is trained."""

import dataclasses

from jaxpost.ops.rope import Rope


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one pattern period; static, so that masks and windows are too."""

    rope: Rope
    window: int | None = None  # positions a query looks back, itself included; None = all
    experts: bool = False  # a mixture of experts in place of the dense MLP


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer (Switch Transformer, arXiv:2101.03961; Mixtral, arXiv:2401.04088)."""

    count: int  # E
    top_k: int  # experts that a token goes through
    mlp_dim: int  # f, of one expert
    normalized: bool  # the chosen experts' probabilities are scaled to sum to 1
    loss_weight: float  # of the load-balancing loss, where the run does not say otherwise


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Layer i is of kind pattern[i % len(pattern)]."""

    family: str  # Hugging Face's model_type
    vocab_size: int  # V
    embed_dim: int  # D
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # h
    mlp_dim: int  # F
    max_positions: int  # context the model was trained for, in tokens
    tied: bool  # the head is the embedding
    norm_eps: float
    pattern: tuple[Layer, ...]
    activation: str = "silu"  # a key of decoder.ACTIVATIONS
    biased: tuple[str, ...] = ()  # which of the products q, k, v, o, gate, up, down add a bias
    qk_norm: bool = False  # queries and keys are normalised per head, before RoPE
    post_norms: bool = False  # what attention and MLP return is normalised too
    unit_offset: bool = False  # norms multiply by 1 + scale
    scaled_embedding: bool = False  # embeddings times sqrt(D)
    attention_scalar: float | None = None  # scores are multiplied by attention_scalar^-0.5; None = head_dim
    attention_soft_cap: float | None = None  # scores = cap * tanh(scores / cap)
    logit_soft_cap: float | None = None  # the same on the head's logits
    experts: Experts | None = None
    num_scores: int = 0  # R: a head of so many scalars in place of the vocabulary's (reward models); 0 = none
    score_norm: tuple[tuple[float, float], ...] = ()  # (mean, spread) of each head's scores on a reference set
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def attention_scale(self) -> float:
        return (self.attention_scalar or self.head_dim) ** -0.5

    @property
    def tail_layers(self) -> int:
        """Layers over after whole pattern periods (Gemma 3: 26 layers over a period of 6 leave 2)."""
        return self.num_layers % len(self.pattern)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))


def shortest_pattern(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The shortest period whose repetition, cut at the end, gives these layers."""
    fits = (n for n in range(1, len(layers) + 1) if all(k == layers[i % n] for i, k in enumerate(layers)))
    return layers[: next(fits)]


def stack_row(layers: tuple[Layer, ...], index: int, module: str) -> int | None:
    """Row of layer `index` in the stack of a module of these layers; None where the layer does not have it.

    All layers have all modules, but "mlp" (dense layers) and "moe" (mixtures of experts).
    """

    def has(layer):
        return module not in ("mlp", "moe") or (module == "moe") == layer.experts

    return sum(map(has, layers[:index])) if has(layers[index]) else None
