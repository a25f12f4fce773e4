"""What PEFT computes of adapters on golden models: `python tests/models/golden/adapters/make.py` beside torch and peft.

Writes NAME.json (the golden model beneath, adapter_config.json as PEFT writes it, the shape of every tensor of the
adapter) and NAME.npz (ids, logits). The weights are not kept: `../weights.py` makes them again from their names.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from weights import tensors_of  # noqa: E402 (of the folder above)

ADAPTERS = {
    "plain": ("llama_biases", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])),
    "rslora": ("gemma3", dict(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")),
    "dora": ("qwen3_windows", dict(r=3, lora_alpha=6, use_dora=True, lora_dropout=0.1, target_modules="all-linear")),
    "scores": ("gemma3_scores", dict(r=2, lora_alpha=4, target_modules=["q_proj"])),
    "beside_experts": ("mixtral", dict(r=2, lora_alpha=4, target_modules=["k_proj"])),
}


def make(name: str) -> None:
    base, values = ADAPTERS[name]
    golden = json.loads((HERE.parent / f"{base}.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "config.json").write_text(json.dumps(golden["config"]))
        save_file(tensors_of(golden["shapes"]), folder / "model.safetensors", metadata={"format": "pt"})
        kind, task = ("SequenceClassification", "SEQ_CLS") if base.endswith("_scores") else ("CausalLM", "CAUSAL_LM")
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model = auto.from_pretrained(folder, attn_implementation="eager")
        peft.get_peft_model(model, peft.LoraConfig(task_type=task, **values)).save_pretrained(folder / "adapter")
        file = folder / "adapter" / "adapter_model.safetensors"
        shapes = {k: list(v.shape) for k, v in sorted(load_file(file).items())}
        save_file(tensors_of(shapes), file, metadata={"format": "pt"})
        model = auto.from_pretrained(folder, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
        written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    ids = np.random.default_rng(1).integers(3, golden["config"]["vocab_size"], (2, 9))
    logits = model(torch.tensor(ids)).logits.detach().numpy()
    written["base_model_name_or_path"] = base
    stored = {"base": base, "config": written, "shapes": shapes}
    (HERE / f"{name}.json").write_text(json.dumps(stored, sort_keys=True) + "\n")
    np.savez_compressed(HERE / f"{name}.npz", ids=ids.astype(np.int32), logits=logits)
    print(name, len(shapes), "tensors")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ADAPTERS:
        make(chosen)
