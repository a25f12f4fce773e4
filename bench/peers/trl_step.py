"""TRL's SFTTrainer and DPOTrainer on one workload, float32 on CPU. Run by bench/step.py; prints one JSON line.

    python bench/peers/trl_step.py --workload FILE [--reference live|cached] [--order given|by_length]

Set for speed where the defaults are for GPU memory: no gradient checkpointing, no bf16 autocast. The rest is TRL's
default: SDPA attention, fused AdamW, chunked LM head, batches padded to their longest sequence.
`--order by_length` puts pairs of like length into one batch, as `train_sampling_strategy="group_by_length"` does.
"""

import argparse
import copy
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")

import datasets
import tokenizers
import torch
import transformers
import trl


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=pathlib.Path, required=True)
    parser.add_argument("--reference", choices=["live", "cached"], default="live")
    parser.add_argument("--order", choices=["given", "by_length"], default="given")
    options = parser.parse_args()
    work = json.loads(options.workload.read_text())
    if options.order == "by_length":
        work["examples"] = by_length(work)
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**work["model"], dtype="float32"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        make = sft_trainer if work["kind"] == "sft" else dpo_trainer
        trainer = make(model, work, folder, options.reference == "cached")
        trainer.add_callback(clock)
        trainer.train()
    seconds = clock.step_seconds()[work["warmup"] - 1 :]
    assert len(seconds) == work["steps"], (len(seconds), work["steps"])
    report = {
        "peer": f"trl {trl.__version__}",
        "seconds_per_step": statistics.median(seconds),
        "examples_per_second": work["batch"] * len(seconds) / sum(seconds),
        "reference_examples_per_second": getattr(trainer, "reference_examples_per_second", None),
        "first_loss": clock.losses[0],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "step_seconds": seconds,
    }
    print(json.dumps(report))


class Clock(transformers.TrainerCallback):
    """When each optimizer step ended, data loading included, and the losses."""

    def __init__(self):
        self.ends, self.losses = [], []

    def step_seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def by_length(work: dict) -> list[dict]:
    """The timed pairs sorted by length and cut into batches; the warm-up batches stay as they are."""
    warmup = work["warmup"] * work["batch"]

    def longest(pair):
        return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))

    return work["examples"][:warmup] + sorted(work["examples"][warmup:], key=longest, reverse=True)


def arguments(work: dict, folder: str) -> dict:
    optimizer = work["optimizer"]
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work["batch"],
        "max_steps": work["warmup"] + work["steps"],
        "train_sampling_strategy": "sequential",
        "learning_rate": optimizer["learning_rate"],
        "adam_beta1": optimizer["b1"],
        "adam_beta2": optimizer["b2"],
        "adam_epsilon": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"],
        "max_grad_norm": optimizer["clip_norm"],
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def sft_trainer(model, work: dict, folder: str, _) -> trl.SFTTrainer:
    config = trl.SFTConfig(**arguments(work, folder), max_length=work["length"])
    data = datasets.Dataset.from_dict({"input_ids": work["examples"]})
    return trl.SFTTrainer(model, config, train_dataset=data, processing_class=id_tokenizer(work))


def dpo_trainer(model, work: dict, folder: str, cached: bool) -> trl.DPOTrainer:
    """DPOTrainer tokenises text itself, so each id is written as a word that stands for it."""
    config = trl.DPOConfig(
        **arguments(work, folder),
        max_length=work["max_prompt"] + work["max_completion"],
        precompute_ref_log_probs=cached,
        beta=0.1,
    )
    text = lambda ids: " ".join(map(word, ids))  # noqa: E731
    rows = [
        {"prompt": text(pair["prompt"]), "chosen": " " + text(pair["chosen"]), "rejected": " " + text(pair["rejected"])}
        for pair in work["examples"]
    ]
    data = datasets.Dataset.from_list(rows)
    reference = None if cached else copy.deepcopy(model)  # TRL can make its own only of a model that lies on disk
    trainer = TimedDPOTrainer(model, reference, config, train_dataset=data, processing_class=id_tokenizer(work))
    check_same_work(trainer, work)
    return trainer


class TimedDPOTrainer(trl.DPOTrainer):
    """DPOTrainer that notes how quick its pass over the reference is."""

    reference_examples_per_second = None

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        start = time.perf_counter()
        result = super()._precompute_ref_logps(dataset, *args, **kwargs)
        self.reference_examples_per_second = len(dataset) / (time.perf_counter() - start)
        return result


def word(token_id: int) -> str:
    return f"<{token_id}>"


def id_tokenizer(work: dict) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids themselves."""
    vocabulary = {word(i): i for i in range(work["model"]["vocab_size"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=word(0)))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": word(0), "bos_token": word(1), "eos_token": word(2)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def check_same_work(trainer, work: dict) -> None:
    """TRL's own preparation must have kept every prompt and completion (it adds an EOS where one is missing)."""
    for row, pair in zip(trainer.train_dataset, work["examples"], strict=True):
        kept = row["prompt_ids"] == pair["prompt"] and all(
            row[f"{side}_ids"][: len(pair[side])] == pair[side] for side in ("chosen", "rejected")
        )
        assert kept, "TRL prepared other tokens than the workload has"


if __name__ == "__main__":
    main()
