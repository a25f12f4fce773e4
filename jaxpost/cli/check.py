"""`jaxpost check --config=dpo`: what a config's data becomes, before any training. Reads no weights."""

from rich.console import Console

from jaxpost import cli
from jaxpost.errors import DataError

EXAMPLES = 3  # printed token by token
KIND = {"sft": "sft", "dpo": "preference"}  # the kind of documents that a stage trains on


def run(arguments: list[str]) -> None:
    config = cli.read_config("check", arguments)
    from jaxpost.data import preflight  # after the config is found good: setup loads jax
    from jaxpost.train.setup import open_data, open_mesh, open_model

    console = Console()
    model = open_model(config, open_mesh(config))
    data = open_data(config, model, KIND[config.stage])
    preflight.show_examples(data.train, model.tokenizer, EXAMPLES, console)
    console.print(data.report.table())
    problems = preflight.check(data.train, model.tokenizer, model.policy.config.vocab_size)
    if problems:
        raise DataError("; ".join(preflight.summary(problems)))
    console.print(f"{len(data.train):,} documents to train on: nothing wrong found", highlight=False)
