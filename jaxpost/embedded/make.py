"""Makes the embedded world: `python -m jaxpost.embedded.make [PART ...]`, by default all parts in this order.

data: corpus, dialogues, pairs, prompts and the tokenizer (seconds). base: pretraining, by the SFT stage on text.
sft: the SFT stage on the base and the dialogues. judged: answers drawn from that, each beside a better one. reward: the
reward stage on the SFT model, the comparisons and these. All training goes through `jaxpost.run`, as any user's would.
"""

import argparse
import gzip
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable

import jax
import numpy as np
import sentencepiece
from safetensors import numpy as safetensors

import jaxpost
from jaxpost import embedded
from jaxpost.data.sources import open_source
from jaxpost.embedded import dialogues, tokenizer, world
from jaxpost.models import hf
from jaxpost.sampling.engine import Sampling, sample, visible_text
from jaxpost.train.prompts import read_prompts

SEED = 0
DOCUMENTS = 20_000  # of the corpus: about 1.5 M tokens
REPLAYED = 800  # documents of it that SFT sees again: about as many tokens as its dialogues
TOKENIZED = 6_000  # documents that the tokenizer is trained on
HELD_OUT_COMPARISONS = 500
DRAWN, DRAWN_TEMPERATURE = 4, 1.2  # answers to each question, of which a reward model learns mistakes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tokenizer.PIECES,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "bfloat16",
}


def make_data() -> None:
    """Writes every data file and the tokenizer. The same seed gives the same bytes."""
    facts = world.make_world(SEED)
    corpus = [{"text": text} for text in world.corpus(facts, SEED, DOCUMENTS)]
    instructions = list(dialogues.instructions(facts, SEED))
    spoken = (turn["content"] for dialogue in instructions for turn in dialogue["messages"])
    files = tokenizer.files(itertools.chain((document["text"] for document in corpus[:TOKENIZED]), spoken))
    processor = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    count = lambda text: len(processor.encode(text))  # noqa: E731

    write_jsonl("corpus", corpus)
    write_jsonl("replay", corpus[-REPLAYED:])
    write_jsonl("instructions", instructions)
    write_jsonl("instructions_eval", dialogues.held_out_dialogues(facts))
    write_jsonl("preferences", dialogues.preferences(facts.trained, facts.trained, SEED, count, rounds=1))
    write_jsonl("preferences_eval", dialogues.preferences(facts.held_out, facts.facts, SEED + 1, count, rounds=1))
    comparisons = distinct(dialogues.preferences(facts.trained, facts.trained, SEED + 2, count, rounds=8))
    write_jsonl("comparisons_eval", comparisons[:HELD_OUT_COMPARISONS])
    write_jsonl("comparisons", comparisons[HELD_OUT_COMPARISONS:])
    write_jsonl("prompts", dialogues.held_out_prompts(facts))
    write_jsonl("questions", dialogues.trained_prompts(facts))
    for name, content in files.items():
        folder = embedded.path("base")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_base(steps: int) -> None:
    """Pretrains the base: text only, no chat token is ever seen."""
    start = pathlib.Path("runs/embedded-start")
    shutil.copytree(embedded.path("base"), start, dirs_exist_ok=True)
    initialise(start)
    changes = {"model.path": str(start), "data.train": str(embedded.path("corpus")), "run.steps": steps}
    changes |= {"optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 50, "optimizer.weight_decay": 0.1}
    train("base", "sft", changes)


def make_sft() -> None:
    """Fine-tunes the base on the world's dialogues: configs/sft.py as it is."""
    train("sft", "sft", {})


def make_judged() -> None:
    """Draws answers to the questions from embedded:sft, and judges them."""
    model = jaxpost.load("embedded:sft")
    settings = Sampling(48, temperature=DRAWN_TEMPERATURE, stop_ids=model.model.tokenizer.stop_ids)
    asked = read_prompts(open_source(embedded.path("questions")), model.model, settings)
    drawing = {"settings": settings, "completions": DRAWN}
    key, tokens = jax.random.key(SEED), [one.tokens for one in asked]
    drawn = sample(model.engine(slots=64), model.params, tokens, key, **drawing)
    texts = [[visible_text(one, model.model.tokenizer, settings) for one in group] for group in drawn]
    write_jsonl("judged", dialogues.judged([one.record for one in asked], texts, world.make_world(SEED), SEED))


def make_reward() -> None:
    """Trains scores for answers: configs/reward.py, on the world's comparisons and on what was drawn and judged."""
    train("reward", "reward", {"data.train": ["embedded", "embedded:judged"], "data.eval": "embedded"})


def train(name: str, of: str, changes: dict) -> None:
    """One run of a config with some keys changed, whose exported weights become `embedded:NAME`, in bfloat16."""
    config = jaxpost.get_config(of)
    config.update_from_flattened_dict(changes)
    config.run.update(dir=f"runs/embedded-{name}", seed=SEED, resume=True)
    run = jaxpost.run(config)
    small = pathlib.Path(config.run.dir) / "bfloat16"  # an export never takes the place of what is not one
    hf.export(small, run.params, run.model.policy, run.model.tokenizer.files(), dtype="bfloat16")
    shutil.copytree(small, embedded.path(name), dirs_exist_ok=True)


def initialise(folder: pathlib.Path) -> None:
    """Writes config.json and random weights: normal(0, 0.02), over sqrt(2 L) for what adds to the residual stream."""
    draw = np.random.default_rng(SEED)
    D, F, L = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
    q, kv = D, CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
    shapes |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "self_attn.o_proj": (D, q), "mlp.down_proj": (D, F)}
    normal = lambda shape, std: draw.normal(0, std, shape).astype(np.float32)  # noqa: E731
    weights = {"model.embed_tokens.weight": normal((CONFIG["vocab_size"], D), 0.02), "model.norm.weight": np.ones(D)}
    for layer in range(L):
        for name, shape in shapes.items():
            residual = name.endswith(("o_proj", "down_proj"))
            std = 0.02 / (2 * L) ** 0.5 if residual else 0.02
            weights[f"model.layers.{layer}.{name}.weight"] = normal(shape, std)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(D)
    weights = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def distinct(records: Iterable[dict]) -> list[dict]:
    """The records without repetitions, in order."""
    return list({json.dumps(record): record for record in records}.values())


def write_jsonl(name: str, records: Iterable[dict]) -> None:
    """One record a line; gzipped without a time stamp where the name ends in .gz, so that the bytes repeat."""
    file = embedded.path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    file.write_bytes(gzip.compress(content, 9, mtime=0) if file.suffix == ".gz" else content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("data", "base", "sft", "judged", "reward")
    parser.add_argument("parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--base_steps", type=int, default=1600)
    chosen = parser.parse_args()
    if "data" in chosen.parts:
        make_data()
    if "base" in chosen.parts:
        make_base(chosen.base_steps)
    if "sft" in chosen.parts:
        make_sft()
    if "judged" in chosen.parts:
        make_judged()
    if "reward" in chosen.parts:
        make_reward()


if __name__ == "__main__":
    main()
