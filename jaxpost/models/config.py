"""What a model is: everything the decoder needs, and nothing about how it is trained."""

import dataclasses

from jaxpost.ops.rope import Rope


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one pattern period; static, so that masks and windows are too."""

    rope: Rope
    window: int | None = None  # positions a query looks back, itself included; None = all


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
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tail_layers(self) -> int:
        """Layers over after whole pattern periods (Gemma 3: 26 layers over a period of 6 leave 2)."""
        return self.num_layers % len(self.pattern)
