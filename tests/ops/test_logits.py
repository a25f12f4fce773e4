"""Functions of logits in chunks against the dense form, by the divergences that they were written for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses import distill
from jaxpost.ops.chunks import products
from jaxpost.ops.logits import map_logits
from jaxpost.ops.logprobs import Head

B, T, D, K, V = 3, 11, 8, 6, 37


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    hidden, weight, bias = draw(B, T, D), draw(V, D), draw(V)
    teacher_hidden, teacher_weight = draw(B, T, K), draw(V, K)
    targets, scored = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.4
    return hidden, weight, bias, teacher_hidden, teacher_weight, targets, scored, draw(2, B, T)


def compare(loss, logits, parts, teacher_weight):
    """(the divergence from the teacher, the target's log-probability)."""
    targets, teacher_hidden = parts
    student = distill.logps(logits)
    teacher = distill.logps(teacher_hidden @ teacher_weight.T)
    return loss(student, teacher), jnp.take_along_axis(student, targets[:, None], axis=-1)[:, 0]


LOSSES = {
    "forward": distill.forward_kl,
    "reverse": distill.reverse_kl,
    "jsd": functools.partial(distill.jsd, beta=0.3),
}


@pytest.mark.parametrize(
    "name, chunk, options",
    [
        ("forward", 1, {}),
        ("reverse", 7, {}),
        ("jsd", 1000, {}),
        ("jsd", 7, {"soft_cap": 3.0, "scale": 0.5, "with_bias": True}),
    ],
)
def test_chunked_equals_dense_values_and_gradients(arrays, name, chunk, options):
    hidden, weight, bias, teacher_hidden, teacher_weight, targets, scored, (c, d) = arrays
    options = dict(options)
    bias = bias if options.pop("with_bias", False) else None
    fn = functools.partial(compare, LOSSES[name])

    def chunked(hidden, weight, bias):
        head = Head(weight, bias, **options)
        out = map_logits(fn, hidden, head, scored, (targets, teacher_hidden), teacher_weight, chunk=chunk)
        return (c * out[0] + d * out[1]).sum(), out

    def dense(hidden, weight, bias):
        z = products(hidden.reshape(-1, D), weight, bias, options.get("scale", 1.0), options.get("soft_cap"))[
            1
        ]  # the head alone; checked against its own dense form in test_logprobs
        out = fn(z, (targets.reshape(-1), teacher_hidden.reshape(-1, K)), teacher_weight)
        out = tuple(jnp.where(scored, x.reshape(B, T), 0) for x in out)
        return (c * out[0] + d * out[1]).sum(), out

    argnums = (0, 1) if bias is None else (0, 1, 2)
    ours = jax.jit(jax.grad(chunked, argnums, has_aux=True))(hidden, weight, bias)
    wanted = jax.jit(jax.grad(dense, argnums, has_aux=True))(hidden, weight, bias)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_array_of_all_logits(arrays):
    """Nothing in forward or backward, student's or teacher's, has as many elements as [B, T, V]."""
    hidden, weight, _, teacher_hidden, teacher_weight, targets, scored, _ = arrays
    fn = functools.partial(compare, LOSSES["jsd"])

    def loss(hidden, weight):
        aligned = (targets, teacher_hidden)
        return map_logits(fn, hidden, Head(weight), scored, aligned, teacher_weight, chunk=B * 2)[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight).as_text()
    assert f"<{B * 2}x{V}xf32>" in text
    assert f"{B}x{T}x{V}x" not in text and f"<{B * T}x{V}x" not in text


def test_unscored_positions_leave_no_trace_and_teachers_get_no_gradient(arrays):
    hidden, weight, _, teacher_hidden, teacher_weight, targets, scored, _ = arrays
    fn = functools.partial(compare, LOSSES["forward"])

    def loss(hidden, teacher_hidden, teacher_weight):
        aligned = (targets, teacher_hidden)
        return map_logits(fn, hidden, Head(weight), scored, aligned, teacher_weight, chunk=3)[0].sum()

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    poison = lambda x: np.where(scored[..., None], x, np.inf)  # noqa: E731
    clean, (d_hidden, *d_teacher) = grad(hidden, teacher_hidden, teacher_weight)
    value, (poisoned, *_) = grad(poison(hidden), poison(teacher_hidden), teacher_weight)
    assert value == clean
    np.testing.assert_array_equal(d_hidden, poisoned)
    assert (np.asarray(d_hidden)[~scored] == 0).all() and not any(np.any(d) for d in d_teacher)


def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(arrays):
    hidden, weight, _, _, _, targets, scored, _ = arrays
    for loss in LOSSES.values():
        fn = functools.partial(compare, loss)

        def total(hidden, weight, fn=fn):
            aligned = (targets, jax.lax.stop_gradient(hidden))
            return map_logits(fn, hidden, Head(weight), scored, aligned, jax.lax.stop_gradient(weight))[0].sum()

        value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, weight)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        for grad in grads:
            np.testing.assert_allclose(grad, 0, atol=2e-6)
