"""`jaxpost teach --config=distill --config.teacher.top_k=64 --to=DIR`: what a teacher says of a config's data, kept."""

import dataclasses

from jaxpost import cli
from jaxpost.errors import ConfigError


def run(arguments: list[str]) -> None:
    parser = cli.config_parser("teach")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty; may be gs://")
    config, flags = cli.parse_config(parser, arguments)
    if config.stage != "distill":
        raise ConfigError(f"--config: a config of the stage {config.stage}; only distill has a teacher")
    if config.teacher.outputs is not None or config.teacher.path is None:
        raise ConfigError("teacher.path: the teacher to ask must be given, and teacher.outputs be None")
    if config.teacher.top_k is None:
        raise ConfigError("teacher.top_k: missing; how many likely tokens to keep at each token (8 bytes each)")
    target = cli.new_folder("--to", flags.to)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenize="ahead"))  # in their order
    from jaxpost.train.objectives import logits_chunk  # after the flags are found good: what follows loads jax
    from jaxpost.train.setup import open_data, open_mesh, open_model, use_compilation_cache
    from jaxpost.train.teacher import write_outputs

    use_compilation_cache(config.run.compilation_cache)
    mesh = open_mesh(config)
    model = open_model(config, mesh)
    data = open_data(config, model, "sft")
    write_outputs(target, config, model, mesh, data, logits_chunk(mesh))
    print(target)
