"""Distillation: the model learns what a teacher would say at every token of given answers, live or from a file.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; its divergences:
Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv:2306.13649.
"""

from jaxpost.losses import distill
from jaxpost.train.distill import distill_objective
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import bind_loss, logits_chunk
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model
from jaxpost.train.teacher import attach_teacher


def run(config) -> Run:
    """Trains on the assistant's tokens of every conversation, towards the teacher's distribution there."""
    # 1. The divergence, by its name and hyperparameters.
    loss = bind_loss(config.loss, distill.LOSSES)
    # 2. Where the run lies, on which devices, from which model.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    # 3. Conversations become tokens with spans, and spans become loss weights.
    data = open_data(config, model, "sft")
    # 4. The teacher: a model that is run in every step, or its likeliest tokens out of a folder.
    data, teacher = attach_teacher(config, model, mesh, data)
    # 5. Minimise the divergence of the two distributions over the next token, and the data's NLL by weight.
    objective = distill_objective(
        model.policy, loss, teacher, nll_weight=config.teacher.nll_weight, chunk=logits_chunk(mesh)
    )
    return fit(
        config,
        folder,
        resume,
        mesh=mesh,
        model=model,
        data=data,
        objective=objective,
        frozen=teacher.frozen,
    )
