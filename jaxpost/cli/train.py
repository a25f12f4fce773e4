"""`jaxpost train --config=dpo --config.loss.beta=0.2`: the same as `python -m jaxpost.main`."""

from jaxpost import cli


def run(arguments: list[str]) -> None:
    config = cli.read_config("train", arguments)
    from jaxpost import api  # after the config is found good: this loads jax

    api.run(config)
