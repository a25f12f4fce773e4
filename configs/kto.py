"""Kahneman-Tversky optimization (KTO): the model learns from single answers that are judged good or bad.

    good: loss = 1 - sigmoid(r - beta * z_0)        r = beta * (log pi(y|x) - log ref(y|x))
    bad:  loss = 1 - sigmoid(beta * z_0 - r)        z_0 = max(0, mean of log pi(y'|x) - log ref(y'|x))

y' are answers to other prompts; z_0 is a mean over a microbatch.

Paper: Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, equations 7 and 8
(https://arxiv.org/abs/2402.01306).

Trains: the embedded SFT model on the embedded pairs, each read as a good and a bad answer. Your own data may be records
with a `label`, or pairs.
Expected:     the first loss is 0.5, since policy and reference are still the same weights. After 40 steps
              the implicit reward ranks 94 % of the held-out pairs right (docs/claims/methods.md).
Time:         40 steps take about a minute on 2 CPU cores.
Command:      python -m jaxpost.main --config=configs/kto.py
BCO:          python -m jaxpost.main --config=configs/kto.py --config.loss.name=bco
Own data:     python -m jaxpost.main --config=configs/kto.py --config.model.path=DIR --config.data.train=RATINGS.jsonl
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "kto"

    config.model = ConfigDict()
    config.model.path = "embedded:sft"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.data = ConfigDict()
    config.data.train = "embedded"  # path (JSON, JSONL, .gz), list of paths or [path, weight] pairs
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # examples; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "kto"  # kto | bco | apo_zero_unpaired, or a dotted path pkg.mod:fn
    config.loss.beta = 1.0  # strength of the pull to the reference, per nat; > 0. Long answers, 1 B and up: 0.05 to 0.5
    # The paper wants desirable_weight * good / (undesirable_weight * bad) between 1 and 1.33; a run logs the counts.
    config.loss.desirable_weight = 1.0  # of good answers
    config.loss.undesirable_weight = 1.0  # of bad ones

    config.reference = ConfigDict()
    config.reference.path = None  # None = the initial weights
    config.reference.mode = "cached"  # cached: computed once, kept on disk | live: in every step | moving (TR-DPO)

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor | lion | muon
    config.optimizer.learning_rate = 1e-4  # peak; > 0. Small models take more: 5e-7 to 5e-6 suits 1 B and up
    config.optimizer.schedule = "cosine"  # cosine | linear | constant, after the warmup
    config.optimizer.warmup_steps = 10  # steps; 0 <= warmup < run.steps
    config.optimizer.final_fraction = 0.1  # share of the peak at the last step; 0 .. 1
    config.optimizer.weight_decay = 0.0  # decoupled, >= 0
    config.optimizer.clip_norm = 1.0  # global norm of the gradient; None = off

    config.batch = ConfigDict()
    config.batch.rows_per_step = 8  # packed rows of one optimizer step, over all devices
    config.batch.tokens_per_row = 512  # tokens; an answer never spans rows
    config.batch.accumulate = 1  # microbatches of a step; divides rows_per_step
    config.batch.documents_per_row = 32  # most answers packed into a row

    config.run = ConfigDict()
    config.run.dir = None  # may be gs://; None: a new folder runs/kto-N
    config.run.steps = 40  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts completed before and after
    config.run.eval_new_tokens = 48  # tokens, at most, of each completion
    config.run.checkpoint_every = 20  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
