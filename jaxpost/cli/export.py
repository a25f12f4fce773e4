"""`jaxpost export --run=RUN_DIR --to=PATH`: the newest weights of a run as a folder that transformers or PEFT loads."""

from jaxpost import cli


def run(arguments: list[str]) -> None:
    parser = cli.Parser("export")
    parser.add_argument("--run", required=True, metavar="DIR", help="run folder; may be gs://")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty; may be gs://")
    parser.add_argument("--merge", action="store_true", help="a whole model, with the run's adapters worked in")
    flags = parser.parse_args(arguments)
    target = cli.new_folder("--to", flags.to)
    from jaxpost import api  # loads jax

    api.load(flags.run).export(target, merge=flags.merge)
    print(target)
