"""`jaxpost data --config=dpo --step=S`, or `--run=RUN_DIR --step=S`: where the documents of a step's rows came from."""

import argparse

from jaxpost import cli
from jaxpost.errors import ConfigError


def run(arguments: list[str]) -> None:
    parser = cli.config_parser("data")
    parser.add_argument("--run", metavar="DIR", help="run folder, in place of --config; its inputs must be unchanged")
    parser.add_argument("--step", type=_step, required=True, metavar="S", help="step as in metrics.jsonl, from 1")
    given = parser.parse_known_args(arguments)[0]
    if given.run is None:
        config, flags = cli.parse_config(parser, arguments)
    else:
        flags = parser.parse_args(arguments)  # the run's config is what it is: no key may be set
        if flags.config is not None:
            raise ConfigError("--config: contradicts --run, whose own config is read; give one of them")
        config = _config_of(flags.run)
    from etils import epath  # after the config is found good: setup loads jax

    from jaxpost.cli.check import kind_of
    from jaxpost.train import inputs
    from jaxpost.train.setup import open_data, open_model, train_loader

    model = open_model(config, mesh=None)
    data = open_data(config, model, kind_of(config))
    try:
        plan = None
        if flags.run is not None:
            inputs.check(epath.Path(flags.run), inputs.describe(config, model, data))
            plan = _plan(flags.run) if data.report.lazy else None
        show(train_loader(config, data, plan), flags.step)
    finally:
        data.close()


def show(loader, step: int) -> None:
    """One line a document: row, file and line, transform, tokens in the row and how many of them are trained."""
    from jaxpost.data.loader import EndOfData

    try:
        rows, place = loader.rows_documents(step - 1), loader.place(step - 1)
    except EndOfData as error:
        raise ConfigError(f"--step: {step} is beyond the last step ({error})") from None
    print(f"step {step}: epoch {place.epoch + 1}, window {place.window + 1}, from its row {place.row + 1} on")
    for number, row in enumerate(rows, start=1):
        for index in row:
            document = loader.documents[index]
            trained = sum(int((weights > 0).sum()) for weights in document.weights)
            print(
                f"row {number}  {document.origin}  {document.transform}  {document.cost:,} tokens, {trained:,} trained"
            )


def _plan(folder: str):
    """What the newest checkpoint says of the windows, so that those before the step need not be tokenised again."""
    from etils import epath

    from jaxpost.train.checkpoint import Checkpointer

    with Checkpointer(epath.Path(folder) / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.extra().get("plan") if checkpoints.steps() else None


def _config_of(folder: str):
    from jaxpost.errors import CheckpointError
    from jaxpost.train.folder import is_run, read_config

    if not is_run(folder):
        raise CheckpointError(f"{folder}: not a run folder (no config.json with a stage in it)")
    return read_config(folder)


def _step(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
