"""`python -m jaxpost VERB`, the same as the console script `jaxpost VERB`."""

from jaxpost import cli

if __name__ == "__main__":
    cli.console()
