"""`jaxpost export --run=RUN_DIR --to=PATH`: the newest weights of a run as a folder that transformers loads."""

from etils import epath

from jaxpost import cli
from jaxpost.errors import CheckpointError


def run(arguments: list[str]) -> None:
    parser = cli.Parser("export")
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder; may be gs://")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty; may be gs://")
    flags = parser.parse_args(arguments)
    target = epath.Path(flags.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"--to: {target} exists and is not an empty folder; give another")
    from jaxpost import api  # loads jax

    api.load(flags.run).export(target)
    print(target)
