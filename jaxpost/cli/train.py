"""`jaxpost train --config=dpo --config.loss.beta=0.2`: the same as `python -m jaxpost.main`."""

from jaxpost import cli

HALTED = 3  # exit code of a run that a rule of halt_when ended


def run(arguments: list[str]) -> int:
    config = cli.read_config("train", arguments)
    from jaxpost import api  # after the config is found good: this loads jax

    return HALTED if api.run(config).halted else 0
