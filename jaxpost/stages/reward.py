"""Reward models: a score for every completion, learnt from pairs and rankings.

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155, step 2.
"""

import functools

from jaxpost.losses import reward
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import bind_loss
from jaxpost.train.ranking import RewardEvaluator, write_report
from jaxpost.train.reward import process_objective, reward_objective
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model, open_reference_set


def run(config) -> Run:
    """Trains scalar heads, and the model under them, on rankings of completions of one prompt."""
    # 1. The loss, by its name and hyperparameters.
    loss = bind_loss(config.loss, reward.LOSSES)
    # 2. Where the run lies, on which devices, from which model: its vocabulary's head gives way to R scalar ones.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    fitted = functools.partial(fit, config, folder, resume, mesh=mesh, model=model)
    if config.loss.name == ("process",):
        # 3. to 5. for answers of several steps: score each step at its last token, against its label.
        data = open_data(config, model, "stepwise")
        return fitted(data=data, objective=process_objective(model.policy, loss))
    # 3. Rankings become documents with one prompt and a branch for each completion, best first; a pair is one of two.
    data = open_data(config, model, "ranking")
    # 4. Score each completion at its last token; minimise -log sigma(r_chosen - r_rejected), or a relative of it.
    several = model.policy.config.num_scores > 1
    objective = reward_objective(
        model.policy,
        loss,
        branches=data.branches,
        margin=config.reward.margin,
        bootstrap_seed=config.run.seed if several and config.reward.bootstrap else None,
    )
    # 5. Whatever is saved says what makes its scores have mean 0 and spread 1 on a reference set.
    evaluator = RewardEvaluator(config, mesh, model, data, objective, open_reference_set(config, model))
    found = fitted(data=data, objective=objective, evaluator=evaluator)
    # 6. Accuracy, calibration and length bias on the held-out rankings, as tables and as a picture.
    if found.finished and data.eval is not None:
        write_report(folder, data.eval, evaluator.scores(found.params).mean(-1))
    return found
