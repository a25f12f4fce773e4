"""Distillation: the model learns the distribution over the next token that a teacher has at every token of an answer.

    loss = KL(teacher || student), mean per token of the assistant's turns (loss.name: forward_kl, reverse_kl, jsd)

Paper: Agarwal et al. 2023, On-Policy Distillation of Language Models, equation 1 (https://arxiv.org/abs/2306.13649),
after Hinton et al. 2015, Distilling the Knowledge in a Neural Network (https://arxiv.org/abs/1503.02531).

Trains: the embedded base model, towards the embedded SFT model on the embedded instructions.
Expected:     asked a question, the base goes on with more questions; afterwards it answers as its teacher does: 96 to
              98 % of the held-out questions right (the teacher 96 %). The divergence on held-out answers falls from 2.9
              nats a token to 0.01 (docs/claims/distill.md).
Time:         100 steps; 6 to 10 minutes on 2 CPU cores that much else was using.
Command:      python -m jaxpost.main --config=configs/distill.py
From a file:  jaxpost teach --config=distill --config.teacher.top_k=16 --to=teacher
              jaxpost train --config=distill --config.teacher.path=None --config.teacher.outputs=teacher
Own data:     python -m jaxpost.main --config=configs/distill.py --config.model.path=DIR --config.teacher.path=DIR
              --config.data.train=FILE
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "distill"

    config.model = ConfigDict()
    config.model.path = "embedded:base"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.teacher = ConfigDict()
    config.teacher.path = "embedded:sft"  # with the same tokenizer; None: see teacher.outputs
    config.teacher.outputs = None  # folder that `jaxpost teach` wrote, in place of a teacher that is loaded
    config.teacher.top_k = None  # compare its k likeliest tokens and the rest as one; None = all tokens
    config.teacher.temperature = 1.0  # divides the logits of both; > 0
    config.teacher.nll_weight = 0.0  # weight of the data's own negative log-likelihood, added; >= 0

    config.data = ConfigDict()
    config.data.train = "embedded"  # path (JSON, JSONL, .gz), list of paths or [path, weight] pairs
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # examples; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "forward_kl"  # forward_kl | reverse_kl | jsd (generalised Jensen-Shannon; loss.beta, 0 .. 1)

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | adafactor | lion | muon
    config.optimizer.learning_rate = 1e-3  # peak; > 0. Small models take more: 1e-5 to 2e-5 suits 1 B and up
    config.optimizer.schedule = "cosine"  # cosine | linear | constant, after the warmup
    config.optimizer.warmup_steps = 10  # steps; 0 <= warmup < run.steps
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
    config.run.dir = None  # may be gs://; None: a new folder runs/distill-N
    config.run.steps = 100  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts completed before and after
    config.run.eval_new_tokens = 48  # tokens, at most, of each completion
    config.run.checkpoint_every = 50  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
