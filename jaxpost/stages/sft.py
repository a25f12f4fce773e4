"""Supervised fine-tuning on conversations, and on plain text (continued pretraining).

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", arXiv:2203.02155, step 1.
"""

from jaxpost.losses import sft
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import bind_loss, logits_chunk, sft_objective
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model


def run(config) -> Run:
    """Trains on the assistant's tokens of every conversation."""
    # 1. The loss, by its name and hyperparameters.
    loss = bind_loss(config.loss, sft.LOSSES)
    # 2. Where the run lies, on which devices, from which model.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    # 3. Conversations become tokens with spans, and spans become loss weights.
    data = open_data(config, model, "sft")
    # 4. Minimise the loss of the trained tokens.
    objective = sft_objective(model.policy, loss, chunk=logits_chunk(mesh))
    return fit(config, folder, resume, mesh=mesh, model=model, data=data, objective=objective)
