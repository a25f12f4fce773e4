"""SFT of Llama-3.1-8B on rows of 32,768 tokens, each over four chips (mesh.context).

Command:    jaxpost plan --config=configs/plans/llama3_8b_sft_32k.py --topology=v5e:4x4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"
    config.model = ConfigDict({"path": "shape:llama-3.1-8b"})
    config.data = ConfigDict({"train": "conversations.jsonl", "eval_examples": 0})
    config.batch = ConfigDict({"rows_per_step": 4, "tokens_per_row": 32768, "documents_per_row": 32})
    config.mesh = ConfigDict({"fsdp": 4, "context": 4})
    config.precision = ConfigDict({"params": "bfloat16", "moments": "bfloat16"})
    config.remat = ConfigDict({"policy": "full"})
    config.run = ConfigDict({"steps": 1000})
    return config
