"""PPO from a learned reward, or any: reinforcement learning from human feedback, step 3.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155; Ziegler et
al. 2019, arXiv:1909.08593; Schulman et al. 2017, arXiv:1707.06347.
"""

import functools

from jaxpost.losses import policy as policy_losses
from jaxpost.train.engines import open_engine, open_sampling
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import observer
from jaxpost.train.objectives import bind_loss, logits_chunk
from jaxpost.train.online import LOGGED, RolloutEvaluator, Trained, fit_online
from jaxpost.train.ppo import METRICS, Ppo, make_learn, make_ppo_optimizer
from jaxpost.train.prompts import open_prompts
from jaxpost.train.rollouts import Rollouts
from jaxpost.train.run import LoadedModel, Run
from jaxpost.train.scoring import open_scorer, summed
from jaxpost.train.setup import open_mesh, open_model, open_reference
from jaxpost.train.value import open_value
from jaxpost.train.watch import Watch


def run(config) -> Run:
    """Draws completions, scores them, and makes those likelier that are worth more than was expected."""
    # 1. The loss, by its name and hyperparameters; the rules that end a run which games its reward.
    loss = bind_loss(config.loss, {"ppo": policy_losses.ppo})
    watch = Watch(config.halt_when, config.warn_when, {*METRICS, *LOGGED})
    # 2. Where the run lies, on which devices; policy, value model, and the reference that the policy stays near to.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    value = open_value(config, model, mesh)
    reference = open_reference(config, model, mesh)
    beneath = model.base is not None and reference is model.base  # the base without its adapters: no second model
    trained = Trained(
        {"policy": model.abstract, "value": value.abstract},
        {"policy": model.shardings, "value": value.shardings},
        {"policy": model.axes, "value": value.axes},
        lambda: {"policy": model.load(), "value": value.load()},
    )
    # 3. Each step: prompts in a seeded order, completions of each, their scores.
    prompts, held_out = open_prompts(config, model)
    engine, settings = open_engine(config, model, mesh, folder), open_sampling(config, model)
    limits = {name: getattr(config.score, name) for name in ("timeout_s", "workers", "combine")}
    score = functools.partial(open_scorer, model=model, mesh=mesh, **limits)
    scorer = summed([score(one, "score.reward") for one in config.score.reward], config.score.weights)
    gold = config.score.gold and score(config.score.gold, "score.gold")
    rollouts = Rollouts(config, engine, settings, prompts, model.tokenizer, scorer, gold, folder)
    # 4. What policy, reference and value say of them; rewards with the KL, advantages, returns; 5. clipped updates.
    off_policy = bool(config.rollout.staleness) or settings.filtered or config.sampling.engine == "http"
    ppo = Ppo(
        model.policy,
        value,
        None if beneath else reference.policy,
        loss,
        config,
        logits_chunk(mesh),
        off_policy=off_policy,
    )
    optimizer = make_ppo_optimizer(config, trained.abstract, trained.axes)
    # 6. Watch for reward hacking: KL, gold score, spread, length, repetition, entropy, completions without an end.
    return fit_online(
        config,
        folder,
        resume,
        mesh=mesh,
        model=model,
        trained=trained,
        rollouts=rollouts,
        evaluator=functools.partial(
            RolloutEvaluator, config, rollouts, held_out, lambda p: LoadedModel(model, p, mesh)
        ),
        learn=lambda n: make_learn(ppo, optimizer.transform, microbatches=n, observe=observer(optimizer.schedule)),
        optimizer=optimizer,
        begin=ppo.begin,
        frozen={} if beneath else {"reference": reference.load()},
        watch=watch,
    )
