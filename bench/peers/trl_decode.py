"""Completions by `generate` of transformers, float32 on CPU. Run by bench/decode.py; prints one JSON line.

    python bench/peers/trl_decode.py --workload FILE --rows R [--temperature T] [--repeats N]

R completions decode together until the last of them is done (a StoppingCriteria ends each at its own length), then the
next R, in the order of the workload. Prompts are padded to the longest of their batch.
"""

import argparse
import json
import os
import pathlib

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")

import timing
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**work["model"], dtype="float32")).eval()
    model.generation_config.eos_token_id = None
    way = {"do_sample": False}
    if options.temperature:
        way = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    prompts = [prompt for prompt in work["prompts"] for _ in range(work["completions"])]
    lengths = [length for of_prompt in work["lengths"] for length in of_prompt]

    def decode(seed: int) -> None:
        torch.manual_seed(seed)
        for start in range(0, len(prompts), options.rows):
            rows, wanted = prompts[start : start + options.rows], lengths[start : start + options.rows]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            ends = transformers.StoppingCriteriaList([Ends(longest, wanted)])
            found = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(wanted), stopping_criteria=ends, pad_token_id=0, **way
            )
            assert found.shape[1] == longest + max(wanted)

    name = f"transformers {transformers.__version__}"
    print(json.dumps({"peer": name, **timing.repeated(decode, options.repeats, sum(lengths))}))


class Ends(transformers.StoppingCriteria):
    """Each row at a length of its own."""

    def __init__(self, prompt: int, lengths: list[int]):
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


if __name__ == "__main__":
    main()
