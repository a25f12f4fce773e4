"""DPO of Llama-3.1-8B on real dialogues, planned for TPU: prompts once in a row, against a copy for each completion.

    python bench/prompts.py --data hh_rlhf.jsonl.gz --tokenizer tokenizer.model [--topology v5e:4x4]

Both ways pack the same pairs into rows; a row costs the same FLOPs whatever lies in it, counted in the program that the
TPU compiler makes of a step of 16 rows. Nothing is cut but what does not fit in a row, which is left out of both.
"""

import argparse
import pathlib

import workload

from jaxpost import config as configs
from jaxpost.data.rows import pack
from jaxpost.plan import planner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="hh-rlhf, chosen and rejected dialogues")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="sentencepiece model")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--tokens-per-row", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=1600)
    options = parser.parse_args()
    longest = options.tokens_per_row
    found = workload.dpo_hh(0, options.pairs // 8, 0, options.data, options.tokenizer, 8, longest, longest)
    pairs = [[len(pair[name]) for name in ("prompt", "chosen", "rejected")] for pair in found["examples"]]
    pairs = [pair for pair in pairs if sum(pair) + 1 <= longest]
    ways = {
        "prompt once": [(p - 1) + (1 + c) + (1 + r) for p, c, r in pairs],
        "prompt copied": [p + completion for p, *both in pairs for completion in both],
    }
    values = configs.to_dict(configs.resolve(configs.load("configs/plans/llama3_8b_dpo.py")))
    values["batch"] |= {"rows_per_step": 16, "tokens_per_row": options.tokens_per_row}
    plan = planner.plan(configs.resolve(values), options.topology)
    flops = plan.programs[0].flops * plan.devices / 16
    print(f"{len(pairs)} pairs, rows of {options.tokens_per_row} tokens, {flops / 1e12:.4g} TFLOP a row\n")
    print("| way | tokens | rows | padding | PFLOP | ratio |\n|---|---|---|---|---|---|")
    base = None
    for name, costs in ways.items():
        rows = len(pack(costs, options.tokens_per_row, 64))
        base = base or rows
        padding = 1 - sum(costs) / (rows * options.tokens_per_row)
        print(f"| {name} | {sum(costs):,} | {rows} | {padding:.1%} | {rows * flops / 1e15:.4g} | {rows / base:.2f} |")


if __name__ == "__main__":
    main()
