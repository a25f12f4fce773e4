"""config.json <-> ModelConfig, by family."""

import dataclasses
from types import ModuleType
from typing import Any

from etils import epath

from jaxpost.errors import CheckpointError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import gemma2, gemma3, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from jaxpost.models.hf.keys import Keys, read_json

FAMILIES: dict[str, ModuleType] = {  # model_type -> read, write, weights, ARCHITECTURE
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
SCORE_HEAD = "ForSequenceClassification"
SCORE_NORM = "jaxpost_score_norm"  # [[mean, spread], ...] of each head: a key of ours, which transformers carries along


def read_config(folder: str, filename: str = "config.json") -> ModelConfig:
    """The model in a Hugging Face folder; eos ids from generation_config.json where there is one, as in generation.

    Raises:
      CheckpointError: a missing folder or file, a broken value, or a feature that the decoder does not have.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; wanted a model in Hugging Face layout")
    keys = Keys(folder / filename, read_json(folder / filename))
    family = keys.values.get("model_type")
    if family not in FAMILIES:
        raise keys.error("model_type", f"{family!r} is not supported; supported: {', '.join(FAMILIES)}")
    known = [architecture(family, scores) for scores in (False, True)]
    architectures = keys.values.get("architectures") or known[:1]
    if not set(known) & set(architectures):
        raise keys.error("architectures", f"{architectures} is not supported; supported: {' or '.join(known)}")
    keys.require("quantization_config")
    config = FAMILIES[family].read(keys)
    if known[0] not in architectures:
        heads = _num_labels(keys)
        config = dataclasses.replace(config, num_scores=heads, score_norm=_score_norm(keys, heads))
    generation = folder / "generation_config.json"
    if generation.exists():
        eos_ids = Keys(generation, read_json(generation)).token_ids("eos_token_id")
        config = dataclasses.replace(config, eos_ids=eos_ids or config.eos_ids)
    return config


def architecture(family: str, scores: bool) -> str:
    """The class of transformers that reads a model of this family, with scalar heads or the vocabulary's."""
    module = FAMILIES[family]
    if not scores:
        return module.ARCHITECTURE
    return getattr(module, "SCORE_ARCHITECTURE", module.ARCHITECTURE.replace("ForCausalLM", SCORE_HEAD))


def _num_labels(keys: Keys) -> int:
    labels = keys.inside("id2label").values
    return keys.integer("num_labels", len(labels) or 2)  # 2 is the default of transformers


def _score_norm(keys: Keys, heads: int) -> tuple[tuple[float, float], ...]:
    found = keys.values.get(SCORE_NORM)
    if found is None:
        return ()
    pairs = found if isinstance(found, list) else []
    good = [isinstance(p, list) and len(p) == 2 and all(type(x) in (int, float) for x in p) and p[1] > 0 for p in pairs]
    if len(good) != heads or not all(good):
        raise keys.error(SCORE_NORM, f"{found!r} is not a list of {heads} [mean, spread] with a spread above 0")
    return tuple((float(mean), float(spread)) for mean, spread in found)


def config_files(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json of an export, as objects."""
    eos = list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None)
    special = {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
    family = FAMILIES[config.family]
    head = {
        "architectures": [architecture(config.family, config.num_scores > 0)],
        "model_type": config.family,
        "torch_dtype": dtype,
    }
    if config.num_scores:
        head["id2label"] = {str(n): f"LABEL_{n}" for n in range(config.num_scores)}
    if config.score_norm:
        head[SCORE_NORM] = [list(pair) for pair in config.score_norm]
    known = {key: value for key, value in special.items() if value is not None}
    return {"config.json": head | family.write(config) | special, "generation_config.json": known}
