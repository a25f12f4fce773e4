"""The work that every peer is given: model shape, token ids and lengths, written to one JSON file a workload.

sft      4 rows of 256 random tokens a step, every token trained
dpo      4 pairs a step, prompt 130 and completions 126 tokens (256 together), reference model every step
dpo_hh   8 pairs a step with the lengths of real dialogues (hh-rlhf): a prompt's last 256 tokens, a
         completion's first 256; the end of a completion that was not cut is EOS
equal    completions of one length for random prompts of one length
gsm8k    completions with the lengths of answers of GSM8K, for its questions
"""

import gzip
import itertools
import json
import pathlib
import random

MODEL = {  # the keys of a Llama config.json
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPTIMIZER = {"learning_rate": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0}
FIRST_ORDINARY_ID = 3
TURN = "\n\nAssistant:"


def _workload(kind: str, warmup: int, steps: int, **fields) -> dict:
    return {"kind": kind, "model": MODEL, "optimizer": OPTIMIZER, "warmup": warmup, "steps": steps, **fields}


def _random_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_ORDINARY_ID, MODEL["vocab_size"]) for _ in range(count)]


def sft(warmup: int, steps: int, seed: int, rows: int = 4, length: int = 256) -> dict:
    """`rows` of `length` random ids a step; tokens_per_step counts the whole rows."""
    rng = random.Random(seed)
    examples = [_random_ids(rng, length) for _ in range((warmup + steps) * rows)]
    return _workload("sft", warmup, steps, batch=rows, length=length, examples=examples)


def dpo(warmup: int, steps: int, seed: int, pairs: int = 4, prompt: int = 130, completion: int = 126) -> dict:
    """Pairs that are all equally long, so that padding plays no part."""
    rng = random.Random(seed)
    examples = []
    for _ in range((warmup + steps) * pairs):
        chosen, rejected = _random_ids(rng, completion), _random_ids(rng, completion)
        examples.append({"prompt": _random_ids(rng, prompt), "chosen": chosen, "rejected": rejected})
    return _workload("dpo", warmup, steps, batch=pairs, max_prompt=prompt, max_completion=completion, examples=examples)


def dpo_hh(
    warmup: int,
    steps: int,
    seed: int,
    data: pathlib.Path,
    tokenizer: pathlib.Path,
    pairs: int = 8,
    max_prompt: int = 256,
    max_completion: int = 256,
) -> dict:
    """A seeded sample of hh-rlhf, tokenised once, so that every peer sees the same ids."""
    import sentencepiece

    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode

    def completion(text: str) -> list[int]:
        return [*encode(text), MODEL["eos_token_id"]][:max_completion]

    examples = []
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            prompt, chosen, rejected = split_pair(record["chosen"], record["rejected"])
            if prompt and chosen.strip() and rejected.strip() and chosen != rejected:
                ids = [MODEL["bos_token_id"], *encode(prompt)][-max_prompt:]
                examples.append({"prompt": ids, "chosen": completion(chosen), "rejected": completion(rejected)})
    random.Random(seed).shuffle(examples)
    needed = (warmup + steps) * pairs
    if needed > len(examples):
        raise SystemExit(f"{data} has {len(examples)} usable pairs, {needed} are needed: lower --steps")
    limits = {"batch": pairs, "max_prompt": max_prompt, "max_completion": max_completion}
    return _workload("dpo", warmup, steps, **limits, examples=examples[:needed])


def equal(prompts: int, completions: int, seed: int, prompt: int = 64, completion: int = 128) -> dict:
    """`completions` of each prompt."""
    rng = random.Random(seed)
    ids = [_random_ids(rng, prompt) for _ in range(prompts)]
    return _decoding(ids, [[completion] * completions for _ in ids])


def gsm8k(prompts: int, completions: int, seed: int, data: pathlib.Path, tokenizer: pathlib.Path) -> dict:
    """A seeded sample of questions; each completion is as long as an answer (with EOS) drawn from all there are."""
    import sentencepiece

    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode
    with open(data, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    rng = random.Random(seed)
    ids = [[MODEL["bos_token_id"], *encode(record["question"])] for record in rng.sample(records, prompts)]
    lengths = [len(encode(record["answer"])) + 1 for record in records]
    return _decoding(ids, [[rng.choice(lengths) for _ in range(completions)] for _ in ids])


def _decoding(prompts: list[list[int]], lengths: list[list[int]]) -> dict:
    return {"kind": "decode", "model": MODEL, "prompts": prompts, "completions": len(lengths[0]), "lengths": lengths}


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues with a common beginning -> prompt (up to the last turn both begin; "" if none) and two ends."""
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    turn = chosen.rfind(TURN, 0, alike)
    cut = 0 if turn < 0 else turn + len(TURN)
    return chosen[:cut], chosen[cut:], rejected[cut:]
