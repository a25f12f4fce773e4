"""jaxpost from a notebook: `run(config) -> Run`."""

import os

from jaxpost import config as configs
from jaxpost.plan import promise
from jaxpost.stages import RUN
from jaxpost.train import hosts
from jaxpost.train.run import LoadedModel, Run, load_model
from jaxpost.train.setup import use_compilation_cache
from jaxpost.train.watchdog import Watchdog

__all__ = ["LoadedModel", "Run", "get_config", "load", "run"]


def get_config(name: str):
    """The config of a stage ("sft", "dpo") or of a config file, to be changed and given to `run`."""
    from ml_collections import ConfigDict

    return ConfigDict(configs.load(name), type_safe=False)  # what a key takes is checked by `run`


def run(config) -> Run:
    """Runs the stage that `config` (ConfigDict, dict, or the name of a config) selects.

    >>> run = jaxpost.run("dpo")                      # doctest: +SKIP
    >>> run.metrics["rewards/accuracies"][-1]         # doctest: +SKIP
    >>> run.chat("What is the capital of France?")    # doctest: +SKIP

    Raises UserError, whose one line names the key, file or example that is wrong.
    """
    resolved = configs.resolve(configs.load(config) if isinstance(config, str) else config)
    hosts.join(resolved)  # first of all: it must precede whatever asks jax for a device
    use_compilation_cache(resolved.run.compilation_cache)
    promised = promise.promise(resolved)
    with Watchdog(resolved.hosts):
        found = RUN[resolved.stage](resolved)
    promise.compare(promised, found)
    return found


def load(path, *, template: str | None = None, weights: bool = True) -> LoadedModel:
    """The newest weights of a run folder, or a model by path (as `model.path`), to talk to and to export.

    template: chat template of a model that has none of its own (as `tokenizer.template`).
    weights: False leaves them unread, where a server samples: `params` and `mesh` are None.
    """
    use_compilation_cache(None)
    return load_model(os.fspath(path), template=template, weights=weights)
