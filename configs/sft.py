"""Supervised fine-tuning (SFT): the model learns to give the assistant's turns of conversations.

Only the assistant's tokens, end of turn included, carry loss: the mean negative log-likelihood per token.
Paper: Ouyang et al. 2022, Training language models to follow instructions with human feedback, section 3.5
(https://arxiv.org/abs/2203.02155).

Trains: the embedded base model (1-2 M parameters, pretrained on a small world of facts and sums) on the embedded
instructions.
Expected:     asked a question, the base goes on with more questions; afterwards the model answers and stops: 96 % of
              the held-out questions right (docs/claims/embedded.md). These weights ship as embedded:sft.
Time:         300 steps take two to three minutes on 2 CPU cores.
Command:      python -m jaxpost.main --config=configs/sft.py
Own data:     python -m jaxpost.main --config=configs/sft.py --config.model.path=DIR --config.data.train=FILE
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "sft"

    config.model = ConfigDict()
    config.model.path = "embedded:base"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.data = ConfigDict()
    config.data.train = "embedded"  # path (JSON, JSONL, .gz), list of paths or [path, weight] pairs
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # examples; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "nll"  # negative log-likelihood of the assistant's tokens, natural log, mean per token

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor | lion | muon
    config.optimizer.learning_rate = 1e-3  # peak; > 0. Small models take more: 1e-5 to 2e-5 suits 1 B and up
    config.optimizer.schedule = "cosine"  # cosine | linear | constant, after the warmup
    config.optimizer.warmup_steps = 20  # steps; 0 <= warmup < run.steps
    config.optimizer.final_fraction = 0.02  # share of the peak at the last step; 0 .. 1
    config.optimizer.b2 = 0.95  # decay of the second moment, per step; 0 <= b2 < 1
    config.optimizer.weight_decay = 0.0  # decoupled, >= 0
    config.optimizer.clip_norm = 1.0  # global norm of the gradient; None = off

    config.batch = ConfigDict()
    config.batch.rows_per_step = 8  # packed rows of one optimizer step, over all devices
    config.batch.tokens_per_row = 256  # tokens; no document spans rows
    config.batch.accumulate = 1  # microbatches of a step; divides rows_per_step
    config.batch.documents_per_row = 32  # most conversations packed into a row

    config.run = ConfigDict()
    config.run.dir = None  # may be gs://; None: a new folder runs/sft-N
    config.run.steps = 300  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts completed before and after
    config.run.eval_new_tokens = 48  # tokens, at most, of each completion
    config.run.checkpoint_every = 100  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
