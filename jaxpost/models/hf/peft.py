"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors, in and out."""

import contextlib
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from jaxpost.errors import CheckpointError
from jaxpost.models.config import ModelConfig
from jaxpost.models.hf.config import FAMILIES
from jaxpost.models.hf.keys import Keys, read_json
from jaxpost.models.hf.load import fingerprint, open_file, read_parameters
from jaxpost.models.hf.names import Weight, sizes_of
from jaxpost.models.hf.save import json_bytes, tensors_of, write_folder
from jaxpost.models.lora import HEADS, Lora, modules_of
from jaxpost.models.policy import Policy

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_weights"  # key of ours in the metadata of the weights
# Keys that are read here, and keys that do not change what is computed. Any other that is set is refused.
READ = {"peft_type", "bias", "target_modules", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout"}
READ |= {"init_lora_weights", "base_model_name_or_path", "modules_to_save"}
HARMLESS = {"task_type", "inference_mode", "peft_version", "revision", "auto_mapping", "runtime_config"}
HARMLESS |= {"megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}


def is_adapter(folder) -> bool:
    return (epath.Path(folder) / CONFIG).exists()


def read_adapter(folder: str, config: ModelConfig) -> Lora:
    """How the adapter in a folder adapts a model of this config. Raises CheckpointError, by file and key."""
    folder = epath.Path(folder)
    if not is_adapter(folder):
        raise CheckpointError(f"{folder}: holds no {CONFIG}; wanted an adapter in the layout of PEFT")
    keys = Keys(folder / CONFIG, read_json(folder / CONFIG))
    if keys.values.get("peft_type") != "LORA":
        raise keys.error("peft_type", f"{keys.values.get('peft_type')!r} is not supported; supported: 'LORA'")
    keys.require("bias", "none")
    saved = keys.values.get("modules_to_save")
    if sorted(saved or []) not in (([HEADS], ["classifier", HEADS]) if config.num_scores else ([],)):
        wanted = [HEADS] if config.num_scores else None
        raise keys.error("modules_to_save", f"{saved!r} is not supported; of this model {wanted} is")
    for name in sorted(keys.values.keys() - READ - HARMLESS):
        if keys.values[name]:
            raise keys.error(name, f"{keys.values[name]!r} is not supported")
    if keys.values.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise keys.error("init_lora_weights", f"{keys.values['init_lora_weights']!r} changes the base")
    named = keys.values.get("target_modules")
    ours = {f"{module.split('/')[1]}_proj": module for module in modules_of(config)}
    if not isinstance(named, list) or not named or set(named) - set(ours):
        raise keys.error("target_modules", f"{named!r} is not a list of some of {', '.join(ours)}")
    return Lora(
        rank=keys.integer("r"),
        alpha=keys.number("lora_alpha"),
        targets=tuple(f"^{ours[name]}$" for name in sorted(named)),
        rslora=keys.flag("use_rslora", False),
        dora=keys.flag("use_dora", False),
        dropout=keys.weight("lora_dropout", 0.0),
    )


def load_adapter(folder: str, policy: Policy, abstract: Any, shardings: Any, base: str | None = None) -> Any:
    """The adapters of `policy` out of a folder, in the types of `abstract`.

    base: folder of the model beneath; None: any. Raises CheckpointError as load_params, and for an adapter that was
    trained on other weights (of those that `export_adapter` wrote: PEFT's do not tell).
    """
    folder = epath.Path(folder)
    with contextlib.ExitStack() as stack:
        file = open_file(folder / WEIGHTS, stack)
        trained_on = (file.metadata() or {}).get(BASE)
        if base is not None and trained_on not in (None, fingerprint(base)):
            raise CheckpointError(f"{folder / WEIGHTS}: was trained on other weights than those in {base}")
        tensors = {name: (WEIGHTS, file) for name in file.keys()}  # noqa: SIM118 (not a dict)
        sizes = sizes_of(policy.config) | {"r": policy.lora.rank}
        return read_parameters(folder, tensors, _weights(policy), policy.config, sizes, abstract, shardings)


def export_adapter(
    path: str, adapters: Any, policy: Policy, base: str, files: dict[str, bytes], *, trained_on: str | None = None
) -> None:
    """Writes a folder that PEFT loads onto the model named `base`, with further `files`. Raises as `export`.

    trained_on: `fingerprint` of the weights beneath.
    """
    lora = policy.lora
    modules = [module for module in modules_of(policy.config) if lora.adapts(module)]
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if policy.config.num_scores else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "target_modules": sorted(f"{module.split('/')[1]}_proj" for module in modules),
        "modules_to_save": [HEADS] if policy.config.num_scores else None,
        "inference_mode": True,
    }
    dtype = str(np.dtype(jax.tree.leaves(adapters)[0].dtype))
    tensors = tensors_of(adapters, _weights(policy), policy.config, dtype)
    metadata = {BASE: trained_on} if trained_on else {}
    write_folder(path, tensors, {CONFIG: json_bytes(values)} | files, marker=CONFIG, single=WEIGHTS, metadata=metadata)


def _weights(policy: Policy) -> tuple[Weight, ...]:
    """The tensors of an adapter, out of the names and dimensions of the weights that they adapt."""
    lora = policy.lora
    found = [Weight(f"{PREFIX}{HEADS}.weight", f"{HEADS}/weight", "R D -> R D")] if policy.config.num_scores else []
    present = {"/".join(path[1:-1]) for path in flatten_dict(policy.abstract()) if path[-1] == "lora_a"}
    for weight in FAMILIES[policy.config.family].weights(policy.config):
        _, *module, leaf = weight.path.split("/")
        if leaf != "weight" or "/".join(module) not in present:
            continue
        tensor, path = PREFIX + weight.name.removesuffix(".weight"), weight.path.removesuffix("weight")
        left, right = weight.dims.split(" -> ")
        outs, ins = weight.groups()
        theirs = [group.strip() for group in _split_groups(left)]
        ours_in = " ".join(letter for letter in right.split() if letter in ins)
        ours_out = " ".join(letter for letter in right.split() if letter in outs)
        found.append(Weight(f"{tensor}.lora_A.weight", f"{path}lora_a", f"r {theirs[1]} -> {ours_in} r"))
        found.append(Weight(f"{tensor}.lora_B.weight", f"{path}lora_b", f"{theirs[0]} r -> r {ours_out}"))
        if lora.dora:
            found.append(
                Weight(f"{tensor}.lora_magnitude_vector", f"{path}lora_magnitude", f"{theirs[0]} -> {ours_out}")
            )
    return tuple(found)


def _split_groups(left: str) -> list[str]:
    """ "(H h) D" -> ["(H h)", "D"]."""
    cut = left.index(")") + 1 if left.startswith("(") else left.index(" ")
    return [left[:cut], left[cut:]]
