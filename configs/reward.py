"""Reward model: a score for every answer, learnt from pairs and rankings of answers to one prompt.

    pairs:     loss = -log sigmoid(r(x, y_w) - r(x, y_l))
    rankings:  its mean over all pairs (all_pairs), or -log of the probability of the order (plackett_luce)

Paper: Ouyang et al. 2022, InstructGPT, equation 1 (https://arxiv.org/abs/2203.02155); margins: Touvron et al. 2023,
Llama 2, section 3.2.2 (https://arxiv.org/abs/2307.09288).

Trains: the embedded SFT model with four scalar heads in place of its vocabulary, each on its own half of the embedded
comparisons, which prefer short, correct, polite answers to rambling, wrong or rude ones.
Expected:     at first half of the 500 held-out pairs are in the right order, after 1,200 steps 0.988; 0.945 of pairs
              about facts that no training pair names (docs/claims/reward.md); the same answers in rankings of four:
              0.992 (docs/claims/rankings.md). Without smoothed labels 0.96, with adamw besides 0.94.
Time:         about two and a half minutes on 2 CPU cores.
Command:      python -m jaxpost.main --config=configs/reward.py
One head:     python -m jaxpost.main --config=configs/reward.py --config.model.score_heads=1    (first loss: ln 2)
Ensembles:    heads on one trunk agree even on what they have never seen; models of three seeds, each with one head and
              reward.init_std=4, differ 5.4 times as much there (docs/claims/ensemble.md): jaxpost.train.scores.joined
Rankings:     python -m jaxpost.main --config=configs/reward.py --config.loss.name=all_pairs --config.data.train=FILE
Others:       loss.name=regression fits the data's own scores; process judges the steps of answers (their labels); as
              plackett_luce they know no smoothing of labels: loss.label_smoothing=None
Scores:       jaxpost.load(RUN_DIR).score("What is the capital of France?", ["Paris.", "Rome."]).mean
What it left: RUN_DIR/reward.json and reward.png: accuracy, calibration, length bias; RUN_DIR/export loads as a
              ...ForSequenceClassification
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "reward"

    config.model = ConfigDict()
    config.model.path = "embedded:sft"  # folder in Hugging Face layout: a language model, or a reward model to train on
    config.model.score_heads = 4  # scalar heads on one trunk, with mean, minimum and spread; see the top

    config.data = ConfigDict()
    config.data.train = "embedded"  # path or list of paths: pairs or rankings; `embedded`: see the top
    config.data.eval = None  # None: the embedded held-out split, or data.eval_examples of your own file
    config.data.eval_examples = 200  # pairs; 0 = none
    config.data.on_bad = "drop"  # drop (counted, reported) | error
    config.data.on_long = "drop"  # drop | truncate

    config.loss = ConfigDict()
    config.loss.name = "bradley_terry"  # pairs: bradley_terry; rankings: all_pairs | plackett_luce; see the top
    config.loss.label_smoothing = 0.1  # share of labels taken to be wrong; 0 .. 0.5. None: see the top
    config.loss.centering = None  # pairs: weight of (r_w + r_l)^2, which draws scores to mean 0; >= 0. 0.01 is usual

    config.reward = ConfigDict()
    config.reward.margin = 0.0  # margin asked for each point of difference in the data's own scores; >= 0
    config.reward.bootstrap = True  # several heads: each learns from its own half of the examples
    config.reward.normalize_on = None  # data whose scores get mean 0 and spread 1; None = what is evaluated on

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # adamw | adafactor | lion | muon
    config.optimizer.learning_rate = 1e-3  # peak; > 0. Small models take more: 5e-6 to 2e-5 suits 1 B and up
    config.optimizer.schedule = "cosine"  # cosine | linear | constant, after the warmup
    config.optimizer.warmup_steps = 20  # steps; 0 <= warmup < run.steps
    config.optimizer.final_fraction = 0.1  # share of the peak at the last step; 0 .. 1
    config.optimizer.weight_decay = 0.0  # decoupled, >= 0
    config.optimizer.clip_norm = 1.0  # global norm of the gradient; None = off

    config.batch = ConfigDict()
    config.batch.rows_per_step = 4  # packed rows of one optimizer step, over all devices
    config.batch.tokens_per_row = 256  # tokens; a ranking (prompt once, all completions) never spans rows
    config.batch.accumulate = 1  # microbatches of a step; divides rows_per_step
    config.batch.documents_per_row = 16  # most rankings packed into a row

    config.run = ConfigDict()
    config.run.dir = None  # may be gs://; None: a new folder runs/reward-N
    config.run.steps = 1200  # optimizer steps (or run.epochs, passes over the data)
    config.run.seed = 0  # 0 .. 2**31 - 1; also of the heads and of which half each learns from
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts whose completions are shown with their scores, before and after
    config.run.checkpoint_every = 400  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
