"""What transformers computes of tiny models of every family: `python tests/models/golden/make.py` beside torch.

Writes NAME.json (config.json as `save_pretrained` writes it, the older spelling of its RoPE keys where there is one,
and the shape of every tensor of the checkpoint) and NAME.npz (ids, mask, logits or scores, router logits, auxiliary
loss, gradient norms, a greedy continuation). The weights are not kept: `weights.py` makes them again from their names.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

from weights import tensors_of  # noqa: E402 (beside this file)

SHARED = dict(
    vocab_size=56,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
    tie_word_embeddings=False,
)
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = dict(head_dim=10, query_pre_attn_scalar=7, sliding_window=4, tie_word_embeddings=True)
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
MODELS = {
    "llama": ("Llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e3, **LLAMA3})),
    "llama_biases": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=8)),
    "mistral": ("Mistral", dict(sliding_window=4, head_dim=10)),
    "mistral_v03": ("Mistral", dict(sliding_window=None, num_key_value_heads=4)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "qwen3_windows": (
        "Qwen3",
        dict(head_dim=10, use_sliding_window=True, sliding_window=3, max_window_layers=1, attention_bias=True),
    ),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=4.0)),
    "gemma3": ("Gemma3Text", GEMMA | dict(layer_types=GEMMA3_LAYERS, rope_parameters=GEMMA3_ROPES)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"})),
    "mixtral_windows": ("Mixtral", dict(num_local_experts=3, num_experts_per_tok=1, sliding_window=4)),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=True),
    ),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1]),
    ),
    "qwen2_scores": ("Qwen2", dict(num_labels=1)),
    "gemma3_scores": ("Gemma3Text", GEMMA | dict(num_labels=3)),
}
LENGTHS = (14, 9)  # tokens of the two rows


def make(name: str) -> None:
    family, values = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SHARED | values)
    kind = "ForSequenceClassification" if "num_labels" in values else "ForCausalLM"
    model_name = family if kind != "ForCausalLM" else family.removesuffix("Text")
    model = getattr(transformers, f"{model_name}{kind}")(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = pathlib.Path(folder)
        shapes = {k: list(v.shape) for k, v in sorted(load_file(path / "model.safetensors").items())}
        save_file(tensors_of(shapes), path / "model.safetensors", metadata={"format": "pt"})
        model = type(model).from_pretrained(folder, attn_implementation="eager").eval()
        written = json.loads((path / "config.json").read_text())
    (HERE / f"{name}.json").write_text(json.dumps({"config": written, "shapes": shapes}) + "\n")
    np.savez_compressed(HERE / f"{name}.npz", **outputs(model, kind))
    print(name, sum(int(np.prod(s)) for s in shapes.values()), "parameters")


def outputs(model, kind) -> dict[str, np.ndarray]:
    rng, width = np.random.default_rng(0), max(LENGTHS)
    ids, mask = rng.integers(3, SHARED["vocab_size"], (len(LENGTHS), width)), np.zeros((len(LENGTHS), width), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, length:], mask[row, :length] = 0, 1
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    found = {"ids": ids.numpy().astype(np.int32), "mask": mask.numpy().astype(np.int32)}
    if kind != "ForCausalLM":
        return found | {"scores": model(ids, attention_mask=mask).logits.detach().numpy()}
    has_experts = getattr(model.config, "num_experts_per_tok", None) is not None
    out = model(ids, attention_mask=mask, **({"output_router_logits": True} if has_experts else {}))
    found["logits"] = out.logits.detach().numpy()
    logps = out.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    nll = -(logps * mask[:, 1:]).sum() / mask[:, 1:].sum()
    loss = nll
    if has_experts:
        found["router_logits"] = np.stack([r.detach().numpy().reshape(*ids.shape, -1) for r in out.router_logits])
        found["aux_loss"] = out.aux_loss.detach().numpy()
        loss = nll + 0.5 * out.aux_loss
    loss.backward()
    found["nll"] = nll.detach().numpy()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found["grad_norm"] = torch.sqrt(sum((g * g).sum() for g in grads)).numpy()
    model.generation_config.eos_token_id = None  # to the end, whatever comes
    whole = model.generate(ids[:1, : LENGTHS[0]], max_new_tokens=6, do_sample=False)
    found["greedy"] = whole.numpy()[0, LENGTHS[0] :]
    return found


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        make(chosen)
