"""Direct preference optimization (DPO): the model learns from pairs of a preferred and a rejected answer.

    loss = -log sigmoid(beta * ((log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))))

Paper: Rafailov et al. 2023, Direct Preference Optimization, equation 7 (https://arxiv.org/abs/2305.18290).

Trains: the embedded SFT model on embedded pairs that prefer short, correct, polite answers to rambling or wrong ones.
Expected:     the first loss is ln 2 = 0.693147, since policy and reference are still the same weights. After 80 steps
              96 % of the held-out pairs are ranked right; greedy answers to held-out questions go from 18 words to 9,
              from never polite to always, and stay right (96 % before, 98 % after; docs/claims/embedded.md).
Time:         80 steps take about a minute on 2 CPU cores.
Command:      python -m jaxpost.main --config=configs/dpo.py
Weaker pull:  python -m jaxpost.main --config=configs/dpo.py --config.loss.beta=0.1    (forgets what it knew: look)
IPO:          python -m jaxpost.main --config=configs/dpo.py --config.loss.name=ipo --config.loss.beta=0.5
APO-zero:     python -m jaxpost.main --config=configs/dpo.py --config.loss.name=apo_zero
RPO:          python -m jaxpost.main --config=configs/dpo.py --config.loss.name="['sigmoid','sft']"
              (40 steps of IPO or APO-zero rank 95 % and 94 % of the held-out pairs right: docs/claims/methods.md)
Adapters:     python -m jaxpost.main --config=configs/dpo.py --config.lora.rank=8 --config.optimizer.learning_rate=1e-3
Own data:     python -m jaxpost.main --config=configs/dpo.py --config.model.path=DIR --config.data.train=PAIRS.jsonl
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "dpo"

    config.model = ConfigDict()
    config.model.path = "embedded:sft"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.data = ConfigDict()
    config.data.train = "embedded"  # path (JSON, JSONL, .gz), list of paths or [path, weight] pairs
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # pairs; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "sigmoid"  # a preference loss of jaxpost.losses, a dotted path pkg.mod:fn, or a list of them
    config.loss.beta = 1.0  # strength of the pull to the reference, per nat; > 0. 1 B and up: 0.05 to 0.5

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
    config.batch.tokens_per_row = 512  # tokens; a pair (prompt once, both answers) never spans rows
    config.batch.accumulate = 1  # microbatches of a step; divides rows_per_step
    config.batch.documents_per_row = 32  # most pairs packed into a row

    config.run = ConfigDict()
    config.run.dir = None  # may be gs://; None: a new folder runs/dpo-N
    config.run.steps = 80  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts completed before and after
    config.run.eval_new_tokens = 48  # tokens, at most, of each completion
    config.run.checkpoint_every = 40  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
