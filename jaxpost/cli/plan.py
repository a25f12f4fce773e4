"""`jaxpost plan --config=dpo --topology=v5e:4x4`: what a run needs on hardware that is not here."""

import json
import os

from jaxpost import cli
from jaxpost.errors import ConfigError


def run(arguments: list[str]) -> int:
    parser = cli.config_parser("plan")
    parser.add_argument(
        "--topology", action="append", metavar="CHIP:SHAPE", help="v5e:4x4, v5p:4x4x4, h100:8; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, a list of one plan a topology")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and accumulation instead")
    parser.add_argument("--best", type=int, default=3, metavar="N", help="of a search: how many are compiled (3)")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was planned before")
    config, flags = cli.parse_config(parser, arguments)
    if not flags.topology:
        raise ConfigError("--topology: missing; give one or more, as in --topology=v5e:4x4")
    # A plan wants no device, and a TPU that is here may be in use.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from jaxpost.plan import planner, search, show  # after the flags are found good: they load jax

    console = Console()
    found = []
    for topology in flags.topology:
        if flags.search:
            shown = None if flags.json else console
            found += search.search(config, topology, best=flags.best, cache=not flags.no_cache, console=shown)
            continue
        found.append(planner.plan(config, topology, cache=not flags.no_cache))
        if not flags.json:
            show.show(found[-1], f"{config.stage} of {config.model.path}", console)
    if flags.json:
        print(json.dumps([json.loads(planner.to_json(one)) for one in found], indent=1))
    return 0
