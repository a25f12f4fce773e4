"""config.json <-> ModelConfig, by family."""

import dataclasses
from types import ModuleType
from typing import Any

from etils import epath

from jaxpost.errors import CheckpointError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf import llama
from jaxpost.models.hf.keys import Keys, read_json

FAMILIES: dict[str, ModuleType] = {"llama": llama}  # model_type -> read, write, weights, ARCHITECTURE


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
    architectures = keys.values.get("architectures") or [FAMILIES[family].ARCHITECTURE]
    if FAMILIES[family].ARCHITECTURE not in architectures:
        raise keys.error(
            "architectures", f"{architectures} is not supported; supported: {FAMILIES[family].ARCHITECTURE}"
        )
    keys.require("quantization_config")
    config = FAMILIES[family].read(keys)
    generation = folder / "generation_config.json"
    if generation.exists():
        eos_ids = Keys(generation, read_json(generation)).token_ids("eos_token_id")
        config = dataclasses.replace(config, eos_ids=eos_ids or config.eos_ids)
    return config


def config_files(config: ModelConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """config.json and generation_config.json of an export, as objects."""
    eos = list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None)
    special = {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
    family = FAMILIES[config.family]
    head = {"architectures": [family.ARCHITECTURE], "model_type": config.family, "torch_dtype": dtype}
    known = {key: value for key, value in special.items() if value is not None}
    return {"config.json": head | family.write(config) | special, "generation_config.json": known}
