"""The main job: `python -m jaxpost.main --config=configs/dpo.py --config.loss.beta=0.2` trains what the config says.

Flags become a config, the config a stage (`jaxpost.api.run`). `jaxpost train` is the same.
"""

import sys

from jaxpost import cli


def main(arguments: list[str]) -> int:
    return cli.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
