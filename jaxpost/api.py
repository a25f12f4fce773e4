"""jaxpost from a notebook: `run(config) -> Run`."""

from jaxpost import config as configs
from jaxpost.stages import RUN
from jaxpost.train.run import Run
from jaxpost.train.setup import use_compilation_cache

__all__ = ["Run", "get_config", "run"]


def get_config(name: str):
    """The config of a stage ("sft", "dpo") or of a config file, to be changed and given to `run`."""
    from ml_collections import ConfigDict

    return ConfigDict(configs.load(name))


def run(config) -> Run:
    """Runs the stage that `config` (ConfigDict, dict, or the name of a config) selects.

    >>> run = jaxpost.run("dpo")                      # doctest: +SKIP
    >>> run.metrics["rewards/accuracies"][-1]         # doctest: +SKIP
    >>> run.chat("What is the capital of France?")    # doctest: +SKIP

    Raises UserError, whose one line names the key, file or example that is wrong.
    """
    resolved = configs.resolve(configs.load(config) if isinstance(config, str) else config)
    use_compilation_cache(resolved.run.compilation_cache)
    return RUN[resolved.stage](resolved)
