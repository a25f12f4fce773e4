"""jaxpost: post-training of language models in JAX. `jaxpost.run(config)` runs a stage from a notebook."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("run", "load", "Run", "LoadedModel", "get_config"):  # lazy: `import jaxpost.losses` needs jax alone
        from jaxpost import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxpost' has no attribute {name!r}")
