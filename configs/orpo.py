"""Odds-ratio preference optimization (ORPO): supervised training on the preferred answers and a penalty, no reference.

    loss = -log p(y_w|x) + beta * -log sigmoid(log odds(y_w|x) - log odds(y_l|x)), odds = p / (1 - p)

p is the geometric mean of the probabilities of an answer's tokens, so -log p is their mean negative log-likelihood.

Paper: Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, equations 6 and 7
(https://arxiv.org/abs/2403.07691); beta is its lambda.

Trains: the embedded SFT model on embedded pairs that prefer short, correct, polite answers to rambling or wrong ones.
Expected:     after 40 steps the mean log-probability ranks all held-out pairs right, from 82 % at the start
              (docs/claims/methods.md).
Time:         40 steps take about a minute on 2 CPU cores.
Command:      python -m jaxpost.main --config=configs/orpo.py
Own data:     python -m jaxpost.main --config=configs/orpo.py --config.model.path=DIR --config.data.train=PAIRS.jsonl
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "orpo"

    config.model = ConfigDict()
    config.model.path = "embedded:sft"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.data = ConfigDict()
    config.data.train = "embedded"  # path (JSON, JSONL, .gz), list of paths or [path, weight] pairs
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # pairs; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "orpo"  # a preference loss that reads no reference, or a dotted path pkg.mod:fn
    config.loss.beta = 1.0  # weight of the odds ratio beside the likelihood; > 0. The paper: 0.1 to 1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor | lion | muon
    config.optimizer.learning_rate = 3e-4  # peak; > 0. Small models take more: 5e-7 to 5e-6 suits 1 B and up
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
    config.run.dir = None  # may be gs://; None: a new folder runs/orpo-N
    config.run.steps = 40  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts completed before and after
    config.run.eval_new_tokens = 48  # tokens, at most, of each completion
    config.run.checkpoint_every = 20  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
