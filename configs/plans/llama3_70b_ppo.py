"""PPO of Llama-3.1-70B: policy and value model of 70 B train, reference and reward model of 70 B are read.

64 prompts a step of at most 512 tokens, 4 completions each of at most 512. Weights lie over tensor 8, as decoding wants
them (docs/performance.md).

Command:    jaxpost plan --config=configs/plans/llama3_70b_ppo.py --topology=v5p:2x4x4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "ppo"
    config.model = ConfigDict({"path": "shape:llama-3.1-70b"})
    config.data = ConfigDict({"train": "prompts.jsonl", "eval_examples": 0})
    config.score = ConfigDict({"reward": "shape:llama-3.1-70b"})
    config.rollout = ConfigDict({"prompts_per_step": 64, "completions_per_prompt": 4, "max_prompt_tokens": 512})
    config.sampling = ConfigDict({"max_new_tokens": 512, "slots": 128, "prefill_tokens": 512})
    config.ppo = ConfigDict({"epochs": 1, "minibatches": 4})
    config.batch = ConfigDict({"rows_per_step": 8, "tokens_per_row": 2048, "documents_per_row": 4})
    config.mesh = ConfigDict({"fsdp": 4, "tensor": 8})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
