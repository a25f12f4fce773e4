"""Pairs of a preferred and a rejected answer: DPO and its relatives, relative to a reference model or without one.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
arXiv:2305.18290. The stages `orpo`, `simpo` and `cpo` are this one with a loss that reads no reference.
"""

from jaxpost.errors import ConfigError
from jaxpost.keys import STAGES_WITH_REFERENCE, ReferenceConfig
from jaxpost.losses.preference import traits_of
from jaxpost.train.folder import choose_folder
from jaxpost.train.loop import fit
from jaxpost.train.objectives import logits_chunk, preference_losses, preference_objective
from jaxpost.train.reference import Reference, attach_reference
from jaxpost.train.run import Run
from jaxpost.train.setup import open_data, open_mesh, open_model


def run(config) -> Run:
    """Trains on pairs of completions of one prompt."""
    # 1. The losses, by name and hyperparameters, and what they need.
    losses = preference_losses(config.loss)
    traits = [traits_of(loss) for _, loss in losses.values()]
    reads_reference = any(t.reads_reference for t in traits)
    check_reference(config, reads_reference)
    # 2. Where the run lies, on which devices, from which model.
    folder, resume = choose_folder(config)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    # 3. Pairs become documents with one prompt and two branches; with their scores where a loss reads the margin.
    data = open_data(config, model, "scored" if any(t.reads_margin for t in traits) else "preference")
    # 4. log pi_ref(y | x) of every completion: from the cache, or in every step of a reference that stays or moves.
    chunk, reference = logits_chunk(mesh), Reference(None)
    if reads_reference:
        data, reference = attach_reference(config, model, mesh, data, chunk)
    # 5. Minimise -log sigma(beta * (log-ratio of the chosen - log-ratio of the rejected)), or a relative of it.
    objective = preference_objective(
        model.policy,
        losses,
        chunk=chunk,
        reference_logps=reference.logps,
        divergence=config.loss.divergence,
        divergence_alpha=config.loss.divergence_alpha,
        ld_alpha=config.loss.ld_alpha,
        wpo=config.loss.wpo,
    )
    return fit(
        config,
        folder,
        resume,
        mesh=mesh,
        model=model,
        data=data,
        objective=objective,
        frozen=reference.frozen,
        carry=reference.carry,
    )


def check_reference(config, reads_reference: bool) -> None:
    """Raises ConfigError where losses and stage, or losses and `reference.*`, contradict each other."""
    names = " and ".join(config.loss.name)
    if reads_reference and config.stage not in STAGES_WITH_REFERENCE:
        raise ConfigError(
            f"loss.name: {names} reads a reference, and the stage {config.stage} has none; set stage='dpo'"
        )
    if not reads_reference and config.reference != ReferenceConfig():
        raise ConfigError(f"reference: {names} reads no reference; leave its keys as they are")
