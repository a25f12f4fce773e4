"""Models with adapters: what trains, what stays, and where both come from."""

import dataclasses
import functools

import jax
from etils import epath

from jaxpost.errors import ConfigError
from jaxpost.models import hf, lora
from jaxpost.models.lora import Lora
from jaxpost.models.quantize import quantizer
from jaxpost.sharding import named_shardings, on_host, with_dtype
from jaxpost.train.folder import model_folder


def as_base(model, quantize: str, offload: bool = False):
    """The model held in the type it computes in, or in fewer bits; its weights are read once and kept.

    offload: in the host's memory.
    """
    keep = None if quantize == "none" else quantizer(quantize, lora.modules_of(model.policy.config))
    abstract = with_dtype(model.abstract, model.policy.compute_dtype)
    shardings = on_host(model.shardings) if offload else model.shardings
    model = dataclasses.replace(model, abstract=abstract, shardings=shardings, quantized=quantize)
    return dataclasses.replace(model, loader=functools.cache(functools.partial(model.load, keep)))


def adapted(model, settings: Lora, folder: epath.Path | None, *, base, mesh, seed: int = 0, any_base: bool = False):
    """`model` with adapters for its parameters, over `base`: those of `folder`, or new ones drawn by `seed`.

    any_base: see `LoraConfig`. Raises ConfigError where a target matches nothing.
    """
    lora.check_targets(settings, model.policy.config)
    policy = dataclasses.replace(model.policy, lora=settings)
    if mesh is None:
        return dataclasses.replace(model, policy=policy, adapter=folder)
    dtype = jax.tree.leaves(model.abstract)[0].dtype
    abstract = with_dtype(lora.split(policy.abstract())[1], dtype)
    shardings = named_shardings(lora.split(policy.axes())[1], mesh, abstract)

    def load():
        if folder is not None:
            return hf.load_adapter(folder, policy, abstract, shardings, None if any_base else model.path)
        draw = jax.jit(functools.partial(lora.fresh, abstract), out_shardings=shardings)
        with jax.set_mesh(mesh):
            return lora.with_magnitudes(draw(base.load(), jax.random.key(seed)), base.load())

    return dataclasses.replace(
        model, policy=policy, abstract=abstract, shardings=shardings, loader=load, base=base, adapter=folder
    )


def with_adapters(config, model, mesh):
    """`model` as config.lora has it: as it is where that is off. Raises ConfigError, CheckpointError."""
    settings = config.lora
    if settings.path is not None:
        folder = adapter_folder(settings.path)
        found = dataclasses.replace(hf.read_adapter(folder, model.policy.config), dropout=settings.dropout)
    elif settings.rank is not None:
        folder, names = None, [field.name for field in dataclasses.fields(Lora)]
        found = Lora(**{name: getattr(settings, name) for name in names})
    else:
        return model
    base = as_base(model, settings.quantize, config.offload.reference) if mesh is not None else None
    return adapted(model, found, folder, base=base, mesh=mesh, seed=config.run.seed, any_base=settings.any_base)


def as_loaded(model, folder, mesh, *, any_base: bool = False):
    """The model of the adapter in `folder` over the base of `model`, with all its parameters, which it shares.

    model: a plain one or an adapted one. Raises CheckpointError where the adapter is another model's (`any_base`: of
    another shape).
    """
    base = model.base or as_base(model, "none")
    settings = hf.read_adapter(folder, base.policy.config)
    other = adapted(base, settings, folder, base=base, mesh=mesh, any_base=any_base)
    return dataclasses.replace(
        other,
        abstract=lora.joined(base.abstract, other.abstract),
        shardings=lora.joined(base.shardings, other.shardings),
        loader=lambda: lora.joined(base.load(), other.load()),
    )


def adapter_folder(path: str) -> epath.Path:
    """Raises ConfigError for a folder without an adapter."""
    folder = model_folder(path)
    if not hf.is_adapter(folder):
        raise ConfigError(f"lora.path: {folder} holds no {hf.ADAPTER_CONFIG}; wanted an adapter in the layout of PEFT")
    return folder


def on_whole(policy, objective):
    """The objective of all parameters as one of those that train, the rest of which lie in `frozen`."""

    def adapted(params, frozen, carry, batch, key):
        return objective(policy.whole(params, frozen), frozen, carry, batch, key)

    return adapted
