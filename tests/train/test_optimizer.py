"""Optimizers against plain numpy, masks, the schedule, and the guard against non-finite gradients."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.config import Layer, ModelConfig
from jaxpost.models.policy import Policy
from jaxpost.ops.rope import Rope
from jaxpost.train.optimizer import apply_updates, leaf_names, make_optimizer, make_schedule, matrices_of, rounded

AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "layers": {
        "q": {"kernel": ("layers", "embed", "heads", "head_dim")},
        "o": {"kernel": ("layers", "heads", "head_dim", "embed")},
        "gate": {"kernel": ("layers", "experts", "embed", "mlp")},
        "norm": {"scale": ("layers", "embed")},
        "q_bias": {"bias": ("layers", "heads", "head_dim")},
    },
}
SHAPES = {
    "embed": {"embedding": (11, 6)},
    "layers": {
        "q": {"kernel": (3, 6, 2, 4)},
        "o": {"kernel": (3, 2, 4, 6)},
        "gate": {"kernel": (3, 2, 6, 5)},
        "norm": {"scale": (3, 6)},
        "q_bias": {"bias": (3, 2, 4)},
    },
}
is_shape = lambda x: isinstance(x, tuple)  # noqa: E731


def settings(**changes):
    plain = {
        "name": "adamw", "learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "final_fraction": 0.1,
        "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": None, "freeze": (), "no_decay": (),
        "max_bad_steps": 3,
    }  # fmt: skip
    return types.SimpleNamespace(**(plain | changes))


def tree(seed, dtype=jnp.float32, shapes=None):
    shapes = SHAPES if shapes is None else shapes
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=is_shape)


@functools.partial(jax.jit, static_argnums=0)
def update(transform, params, state, grads):
    updates, state = transform.update(grads, state, params)
    return apply_updates(params, updates), state


def run(optimizer, params, grads_of_steps):
    """Parameters and state after the given gradients."""
    state = optimizer.transform.init(params)
    for grads in grads_of_steps:
        params, state = update(optimizer.transform, params, state, grads)
    return params, state


def named(tree):
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def assert_trees_close(a, b, tolerance=1e-6):
    assert leaf_names(a) == leaf_names(b)
    for name, x in named(a).items():
        np.testing.assert_allclose(x, named(b)[name], rtol=tolerance, atol=tolerance, err_msg=name)


def adamw_by_hand(p, grads, rate, b1, b2, eps, decay):
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adamw_is_the_papers_and_decays_matrices_alone(dtype):
    params, grads = tree(0, dtype), [tree(s, dtype) for s in (1, 2, 3)]
    got, _ = run(make_optimizer(settings(weight_decay=0.1, no_decay=("^embed/",)), 3, params), params, grads)
    for name, p in named(params).items():
        decay = 0.1 if name.startswith(("layers/q/", "layers/o/", "layers/gate/")) else 0.0
        history = [np.asarray(named(g)[name], np.float32) for g in grads]
        want = adamw_by_hand(np.asarray(p, np.float32), history, 0.01, 0.9, 0.999, 1e-8, decay)
        # bf16 parameters are rounded after each of the 3 steps, by at most 2**-9 of their size
        tolerance = 1e-5 if dtype == jnp.float32 else 3 * 2**-8
        np.testing.assert_allclose(np.asarray(named(got)[name], np.float64), want, rtol=tolerance, atol=tolerance)
        assert named(got)[name].dtype == dtype


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_bf16_parameters_have_f32_state_throughout(name):
    # Trap 12: optax takes the type of the second moment from the parameters.
    params = tree(0, jnp.bfloat16)
    optimizer = make_optimizer(settings(name=name), 10, params, AXES)
    _, state = run(optimizer, params, [tree(1, jnp.bfloat16)])
    for either in (state, optimizer.transform.init(params)):
        floats = [x for x in jax.tree.leaves(either) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert floats and all(x.dtype == jnp.float32 for x in floats)


def test_the_second_moment_of_bf16_parameters_decays():
    # In bf16, 0.999 * nu rounds back to nu (and b2 = 0.999 to 1.0): after a large gradient it would never shrink.
    params = {"w": jnp.zeros((4,), jnp.bfloat16)}
    grads = [{"w": jnp.full((4,), g, jnp.bfloat16)} for g in [1.0] + [0.0] * 20]
    _, state = run(make_optimizer(settings(), 30, params), params, grads)
    (nu,) = optax.tree.get_all_with_path(state, "nu")
    np.testing.assert_allclose(nu[1]["w"], 0.001 * 0.999**20, rtol=1e-5)


def test_moments_are_kept_in_the_type_asked_for():
    params = tree(0)
    _, state = run(make_optimizer(settings(), 9, params, moment_dtype=jnp.bfloat16), params, [tree(1)])
    for key in ("mu", "nu"):
        ((_, found),) = optax.tree.get_all_with_path(state, key)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


def test_bf16_moments_are_rounded_up_or_down_at_random():
    """Each to one of its two neighbours, on average right."""
    x = jnp.full(100_000, 1.0 + 2**-9, jnp.float32)  # a quarter of the way from 1 to the next bf16 number
    found = np.asarray(rounded(x, jnp.bfloat16, jnp.uint32(0)).astype(jnp.float32))
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    np.testing.assert_allclose(found.mean(), 1.0 + 2**-9, atol=4 * 2**-7 * (3 / 16 / 100_000) ** 0.5)  # 4 deviations
    other = np.asarray(rounded(x, jnp.bfloat16, jnp.uint32(1)).astype(jnp.float32))
    both = ((found > 1) & (other > 1)).mean()  # draws of two steps know nothing of each other
    np.testing.assert_allclose(both, 1 / 16, atol=4 * (1 / 16 * 15 / 16 / 100_000) ** 0.5)
    exact = jnp.array([0.0, 1.0, -2.5, jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(rounded(exact, jnp.bfloat16, jnp.uint32(1)).astype(jnp.float32), exact)


def test_a_bf16_second_moment_decays():
    params = {"w": jnp.zeros((4096,), jnp.bfloat16)}
    grads = [{"w": jnp.full((4096,), g, jnp.bfloat16)} for g in [1.0] + [0.0] * 200]
    _, state = run(make_optimizer(settings(), 300, params, moment_dtype=jnp.bfloat16), params, grads)
    ((_, nu),) = optax.tree.get_all_with_path(state, "nu")
    mean = float(nu["w"].astype(jnp.float32).mean())
    np.testing.assert_allclose(mean, 0.001 * 0.999**200, rtol=0.02)  # rounded to nearest it stays at 0.001


def test_lion_steps_by_the_sign():
    params, grads = tree(0), [tree(1)]
    got, _ = run(make_optimizer(settings(name="lion"), 1, params), params, grads)
    assert_trees_close(got, jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, grads[0]))


def test_adafactor_decays_by_learning_rate_times_weight_decay():
    # optax.adafactor decays by weight_decay alone: a tenth of every weight at every step.
    params = {"kernel": jnp.ones((4, 4))}
    got, _ = run(
        make_optimizer(settings(name="adafactor", weight_decay=0.1), 1, params), params, [{"kernel": jnp.zeros((4, 4))}]
    )
    np.testing.assert_allclose(got["kernel"], 1 - 0.01 * 0.1, rtol=1e-6)


def test_adafactors_first_step_is_the_sign_clipped_to_unit_rms():
    params, grads = {"kernel": jnp.ones((4, 4))}, tree(1, shapes={"kernel": (4, 4)})
    got, _ = run(make_optimizer(settings(name="adafactor"), 1, params), params, [grads])
    np.testing.assert_allclose(got["kernel"], 1 - 0.01 * np.sign(grads["kernel"]), rtol=1e-5)


def test_muon_of_stacked_weights_is_muon_of_each_matrix():
    # Trap 12: without dimension numbers optax gives every stacked weight to Adam.
    params, history = tree(0), [tree(s) for s in (1, 2)]
    got, _ = run(make_optimizer(settings(name="muon", weight_decay=0.1), 2, params, AXES), params, history)

    def matrices(tree, name):
        """The separate 2-D matrices [in, out] of a stacked weight."""
        x = np.asarray(tree["layers"][name]["kernel"])
        if name == "gate":
            return [{"w": x[layer, i]} for layer in range(3) for i in range(2)]
        return [{"w": x[layer].reshape((6, 8) if name == "q" else (8, 6))} for layer in range(3)]

    muon = optax.contrib.muon(0.01, weight_decay=0.1, consistent_rms=0.2)
    for name in ("q", "o", "gate"):
        for i, want in enumerate(matrices(params, name)):
            with jax.numpy_dtype_promotion("standard"):
                state = muon.init(want)
                for grads in history:
                    want, state = update(muon, want, state, matrices(grads, name)[i])
            np.testing.assert_allclose(
                matrices(got, name)[i]["w"], want["w"], rtol=1e-4, atol=1e-6, err_msg=f"{name} {i}"
            )


def test_muon_gets_every_matrix_of_the_decoder():
    pattern = (Layer(Rope()), Layer(Rope(), window=4))
    config = ModelConfig("llama", 11, 6, 3, 3, 1, 2, 5, 16, tied=False, norm_eps=1e-5, pattern=pattern)
    policy = Policy(config)
    sides = {}
    for name, dims in matrices_of(policy.abstract(), policy.axes()).items():
        shape = named(policy.abstract())[name].shape
        sides[name] = tuple(math.prod(shape[i] for i in axes) for axes in dims)
    one = {
        "attn/q/weight": (6, 6),
        "attn/k/weight": (6, 2),
        "attn/v/weight": (6, 2),
        "attn/o/weight": (6, 6),
        "mlp/gate/weight": (6, 5),
        "mlp/up/weight": (6, 5),
        "mlp/down/weight": (5, 6),
    }
    assert sides == {f"{part}/{name}": size for part in ("layers", "tail") for name, size in one.items()}


def test_muon_leaves_embeddings_norms_and_biases_to_adamw():
    params, grads = tree(0), [tree(1), tree(2)]
    muon, _ = run(make_optimizer(settings(name="muon", weight_decay=0.1), 2, params, AXES), params, grads)
    adamw, _ = run(make_optimizer(settings(weight_decay=0.1), 2, params), params, grads)
    for name in ("embed/embedding", "layers/norm/scale", "layers/q_bias/bias"):
        np.testing.assert_array_equal(named(muon)[name], named(adamw)[name])
    assert not np.allclose(named(muon)["layers/q/kernel"], named(adamw)["layers/q/kernel"])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_frozen_parameters_stand_still_and_have_no_moments(name):
    params = tree(0)
    frozen = ("^embed/", "layers/q/")
    optimizer = make_optimizer(settings(name=name, weight_decay=0.1, freeze=frozen), 5, params, AXES)
    got, state = run(optimizer, params, [tree(1), tree(2)])
    for leaf, x in named(params).items():
        still = leaf.startswith(("embed/", "layers/q/"))
        assert bool((named(got)[leaf] == x).all()) == still, leaf
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert (11, 6) not in shapes and (3, 6, 2, 4) not in shapes
    assert (3, 6) in shapes


def test_frozen_gradients_do_not_count_in_the_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan, 100.0])}
    _, state = run(make_optimizer(settings(freeze=("b",)), 5, params), params, [grads])
    assert float(state.grad_norm) == 5.0 and int(state.bad_total) == 0


def test_clipping_scales_to_the_norm_and_reports_it_unclipped():
    params = {"w": jnp.zeros((2,), jnp.bfloat16)}
    grads = {"w": jnp.array([3.0, 4.0], jnp.bfloat16)}
    optimizer = make_optimizer(settings(name="adamw", clip_norm=1.0, b1=0.0), 5, params)
    _, state = run(optimizer, params, [grads])
    assert float(state.grad_norm) == 5.0
    ((_, mu),) = optax.tree.get_all_with_path(state, "mu")
    np.testing.assert_allclose(mu["w"], [0.6, 0.8], rtol=1e-6)


def test_the_norm_of_bf16_gradients_is_f32():
    grads = {"w": jnp.asarray([1.0] + [2.0**-5] * 1000, jnp.bfloat16)}
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = run(make_optimizer(settings(), 5, params), params, [grads])
    np.testing.assert_allclose(state.grad_norm, np.sqrt(1 + 1000 / 1024), rtol=1e-6)


def test_a_step_with_a_non_finite_gradient_changes_nothing_but_the_counts():
    params, good = tree(0), [tree(1), tree(2), tree(3)]
    bad = [tree(9) for _ in range(3)]
    for grads, poison in zip(bad, (np.nan, np.inf, -np.inf), strict=True):
        grads["layers"]["norm"]["scale"] = grads["layers"]["norm"]["scale"].at[1, 2].set(poison)
    optimizer = make_optimizer(settings(schedule="linear", clip_norm=1.0), 8, params)
    want, want_state = run(optimizer, params, good)
    got, state = run(optimizer, params, [good[0], bad[0], bad[1], good[1], bad[2], good[2]])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, state.inner, want_state.inner)
    assert (int(state.applied), int(state.bad_in_a_row), int(state.bad_total)) == (3, 0, 3)
    _, state = run(optimizer, params, [good[0], bad[0], bad[1]])
    assert (int(state.applied), int(state.bad_in_a_row), int(state.bad_total)) == (1, 2, 2)
    assert not np.isfinite(float(state.grad_norm))


def schedule_of(steps, **changes):
    schedule = make_schedule(settings(learning_rate=1.0, **changes), steps)
    return np.array([schedule(i) for i in range(steps + 1)])


def test_warmup_rises_to_the_full_rate_and_no_update_has_none():
    rates = schedule_of(10, warmup_steps=4)
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8] + [1.0] * 7, rtol=1e-6)


def test_linear_and_cosine_fall_to_the_final_fraction():
    progress = np.arange(9) / 8
    linear = schedule_of(10, schedule="linear", warmup_steps=2, final_fraction=0.2)
    np.testing.assert_allclose(linear[2:], 1 - 0.8 * progress, rtol=1e-6)
    cosine = schedule_of(10, schedule="cosine", warmup_steps=2, final_fraction=0.2)
    np.testing.assert_allclose(cosine[2:], 0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def test_the_update_of_a_step_has_the_rate_of_its_schedule():
    params = {"w": jnp.zeros(())}
    optimizer = make_optimizer(settings(name="lion", schedule="linear", warmup_steps=2), 6, params)
    got, _ = run(optimizer, params, [{"w": jnp.ones(())}] * 6)
    np.testing.assert_allclose(got["w"], -sum(float(optimizer.schedule(i)) for i in range(6)), rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=5 does not fit in the 5 updates"):
        make_schedule(settings(warmup_steps=5), 5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"freeze": ("embed", "nothing")},
            r"freeze: 'nothing' matches no parameter; there are embed/embedding",
        ),
        ({"no_decay": ("lm_head",)}, r"optimizer\.no_decay: 'lm_head' matches no parameter"),
        ({"no_decay": ("layers/*[",)}, r"optimizer\.no_decay: 'layers/\*\[' is not a regular expression"),
        ({"freeze": (".",)}, r"optimizer\.freeze: \['\.'\] freezes every parameter"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(settings(**changes), 5, tree(0))


def test_abstract_parameters_suffice_and_init_needs_no_values():
    params = jax.eval_shape(lambda: tree(0))
    optimizer = make_optimizer(settings(name="muon", freeze=("embed",)), 5, params, AXES)
    abstract = jax.eval_shape(optimizer.transform.init, params)
    concrete = optimizer.transform.init(tree(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
