"""PPO: the model draws answers, a reward model scores them, and what is worth more than expected becomes likelier.

    reward of token t = -kl.coef * (log pi(t) - log ref(t)), and at the last one the score besides
    loss = -min(r A, clip(r, 1 - 0.2, 1 + 0.2) A) + value.coef * value loss,   r = pi / pi_old, A by GAE

Paper: Schulman et al. 2017, equation 7 (https://arxiv.org/abs/1707.06347); for language models Ouyang et al. 2022,
InstructGPT (https://arxiv.org/abs/2203.02155). docs/ppo.md has every detail of the published implementations.

Trains: the embedded SFT model on questions about trained facts, by the embedded reward model, which learnt from
comparisons. PPO never sees the gold score: 1 where an answer is right and polite, 0.5 where it is right.
Expected:     gold goes from 0.48 to 0.78 on held-out questions and from 0.54 to 0.9 on those of the training, at a KL
              of 2 nats an answer (docs/claims/ppo.md).
Time:         30 steps take under three minutes of CPU time.
Command:      python -m jaxpost.main --config=configs/ppo.py
One trunk:    python -m jaxpost.main --config=configs/ppo.py --config.value.model=head
Adaptive KL:  python -m jaxpost.main --config=configs/ppo.py --config.kl.controller=adaptive --config.kl.target=4
Own reward:   python -m jaxpost.main --config=configs/ppo.py --config.score.reward=my_pkg.mod:fn
              fn(question, answer, record) -> float; question: messages or raw text
A server:     python -m jaxpost.main --config=configs/ppo.py --config.sampling.engine=http ...    (docs/servers.md)
What it left: RUN_DIR/frontier.png: reward and gold score over the KL, and the signs of reward hacking;
              RUN_DIR/rollouts: what was drawn and what it scored; RUN_DIR/export
Every key, with default, unit and range:  jaxpost train --help
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stage = "ppo"

    config.model = ConfigDict()
    config.model.path = "embedded:sft"  # folder in Hugging Face layout, hub name (extra `hf`), embedded:base|sft

    config.data = ConfigDict()
    config.data.train = "embedded"  # path or list of paths: prompts, or any records, whose questions are taken
    config.data.eval = None  # None: the embedded held-out questions, or data.eval_examples of your own file
    config.data.eval_examples = 110  # prompts; 0 = none

    config.score = ConfigDict()
    config.score.reward = "embedded:reward"  # reward model (run or model folder), or pkg.mod:fn
    config.score.gold = "jaxpost.embedded.dialogues:gold"  # as score.reward, never trained on; None = none
    config.score.missing_eos_penalty = 1.0  # taken off an answer that did not end by itself

    config.rollout = ConfigDict()
    config.rollout.prompts_per_step = 32  # prompts
    config.rollout.completions_per_prompt = 4  # answers drawn for each
    config.rollout.max_prompt_tokens = 64  # tokens; longer prompts are dropped, and counted

    config.sampling = ConfigDict()
    config.sampling.temperature = 1.0  # in sampling and in training
    config.sampling.max_new_tokens = 48  # tokens
    config.sampling.slots = 64  # answers that decode at once

    config.kl = ConfigDict()
    config.kl.coef = 0.05  # per nat
    config.kl.where = "reward"  # reward | loss
    config.kl.estimator = "k1"  # k1 | k2 | k3
    config.kl.controller = "fixed"  # fixed | adaptive

    config.value = ConfigDict()
    config.value.model = "own"  # own: begins as the reward model, or the policy | head: on the policy's hidden states
    config.value.coef = 0.5  # of its loss

    config.ppo = ConfigDict()
    config.ppo.epochs = 2  # passes over a step's answers
    config.ppo.minibatches = 2  # updates of a pass
    config.ppo.lam = 0.95  # of GAE
    config.ppo.whiten_advantages = True  # to mean 0 and spread 1 over all tokens of the step

    config.loss = ConfigDict()
    config.loss.epsilon_low = 0.2  # the ratio is clipped to 1 - epsilon_low
    config.loss.epsilon_high = 0.2  # and 1 + epsilon_high

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-4  # peak; > 0. Small models take more: 1e-6 suits 1 B and up
    config.optimizer.schedule = "linear"  # cosine | linear | constant, after the warmup
    config.optimizer.warmup_steps = 2  # steps
    config.optimizer.clip_norm = 1.0  # global norm of the gradient; None = off

    config.batch = ConfigDict()
    config.batch.rows_per_step = 4  # packed rows of a microbatch; a minibatch has as many of these as it needs
    config.batch.tokens_per_row = 512  # tokens; a prompt with all its answers, or as many as fit
    config.batch.documents_per_row = 16  # most prompts packed into a row

    config.halt_when = ("kl > 20", "length > 1.5x start", "gold falls while reward rises over 20")  # end the run
    config.warn_when = ("reward_std < 1e-6 for 5", "no_eos > 0.5")  # rules that only warn (train/watch.py)

    config.run = ConfigDict()
    config.run.dir = None  # may be gs://; None: a new folder runs/ppo-N
    config.run.steps = 30  # of drawing and learning
    config.run.seed = 0  # 0 .. 2**31 - 1
    config.run.eval_every = 0  # steps; 0 = only at the end
    config.run.eval_prompts = 4  # held-out prompts whose answers are shown, before and after
    config.run.checkpoint_every = 5  # steps; 0 = only at the end
    config.run.resume = False  # True: go on from the newest checkpoint of run.dir
    return config
