"""Direct preference optimization: prefer the chosen answer to the rejected one, relative to a reference model.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv:2305.18290.
"""

from jaxpost.losses import preference
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import bind_loss, logits_chunk, preference_objective
from jaxpost.train.reference import attach_reference
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model


def run(config) -> Run:
    """Trains on pairs of completions of one prompt."""
    # 1. The loss, by its name and hyperparameters.
    loss = bind_loss(config.loss, preference.LOSSES)
    # 2. Where the run lies, on which devices, from which model.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    # 3. Pairs become documents with one prompt and two branches.
    data = open_data(config, model, "preference")
    # 4. log pi_ref(y | x) of every completion: from the cache, or in every step of a reference that stays or moves.
    chunk = logits_chunk(mesh)
    data, reference = attach_reference(config, model, mesh, data, chunk)
    # 5. Minimise -log sigma(beta * (log-ratio of the chosen - log-ratio of the rejected)), or a relative of it.
    objective = preference_objective(
        model.policy,
        loss,
        beta=config.loss.hyperparameters.get("beta", 1.0),
        chunk=chunk,
        reference_logps=reference.logps,
    )
    return fit(
        config,
        folder,
        resume,
        mesh=mesh,
        model=model,
        data=data,
        objective=objective,
        load_params=model.load,
        frozen=reference.frozen,
        carry=reference.carry,
    )
