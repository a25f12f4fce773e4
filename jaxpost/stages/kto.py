"""Answers judged good or bad, each by itself: KTO and its relatives (BCO, APO-zero).

Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306.
"""

import logging

from jaxpost.losses import unpaired
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import bind_loss, logits_chunk
from jaxpost.train.reference import attach_reference
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model, with_mismatched
from jaxpost.train.step import join
from jaxpost.train.unpaired import baseline_of, running_rewards, unpaired_objective

log = logging.getLogger("jaxpost")


def run(config) -> Run:
    """Trains on single completions with a label; of a pair, the chosen one is good and the rejected one bad."""
    # 1. The loss, by its name and hyperparameters.
    loss = bind_loss(config.loss, unpaired.LOSSES)
    # 2. Where the run lies, on which devices, from which model.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    # 3. Each answer becomes a document; where z_0 is estimated, with an answer to another prompt as a second branch.
    data = open_data(config, model, "unpaired")
    tell_labels(data.train)
    if baseline_of(loss) == "kl":
        data = with_mismatched(config, model, data)
    # 4. log pi_ref(y | x) of every completion: from the cache, or in every step of a reference that stays or moves.
    chunk = logits_chunk(mesh)
    data, reference = attach_reference(config, model, mesh, data, chunk)
    # 5. Minimise lambda * (1 - sigma(+-(r - beta * z_0))), or a relative of it.
    (name,) = config.loss.name
    objective = unpaired_objective(model.policy, name, loss, chunk=chunk, reference_logps=reference.logps)
    remembered = running_rewards(mesh) if baseline_of(loss) == "reward" else None
    return fit(
        config,
        folder,
        resume,
        mesh=mesh,
        model=model,
        data=data,
        objective=objective,
        frozen=reference.frozen,
        carry=join(reference.carry, remembered),
    )


def tell_labels(documents) -> None:
    """Logs how many are good and bad, and warns where all are one: then a loss only pushes up, or only down."""
    labels = [document.completion["label"][0] for document in documents]
    good = int(sum(labels))
    log.info("labels: %d good, %d bad", good, len(labels) - good)
    if good in (0, len(labels)):
        only, way = (
            ("good", "up: this is close to supervised training") if good else ("bad", "down: the model unlearns")
        )
        log.warning("data.train: all %d labels are %s, so every answer is only pushed %s", len(labels), only, way)
