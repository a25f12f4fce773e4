"""What becomes of merged tensors: loops written from the papers, hand arithmetic, and what must hold."""

import math

import ml_dtypes
import numpy as np
import pytest

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models.merging import METHODS, Recipe, Trim, disjoint_mean, drop, slerp_weights
from jaxpost.models.merging import merge_tensors as merge_some

SHAPES = [(7,), (5, 8), (3, 4, 2)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def draw(shape, count, seed=0, dtype=np.float32):
    return [np.random.default_rng([seed, i]).standard_normal(shape).astype(dtype) for i in range(count)]


def recipe(method, weights, **values):
    values = {"density": 0.4} | values if METHODS[method].sparse else values
    return Recipe(method, tuple(weights), **values)


def merge_tensors(recipe, name, tensors, base=None, **values):
    return merge_some(recipe, name, tensors, base, shape=tensors[0].shape, **values)


def slerp(first, second, t):
    return merge_tensors(recipe("slerp", (1 - t, t)), "w", [first, second])


def trim(vector, density):
    return Trim(lambda: [vector], vector.size, density)(vector)


# ---- linear ----


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_weighted_mean(shape):
    first, second, third = draw(shape, 3, dtype=np.float64)
    merged = merge_tensors(recipe("linear", (1.0, 2.0, 5.0)), "w", [first, second, third])
    np.testing.assert_allclose(merged, (first + 2 * second + 5 * third) / 8, rtol=1e-14)


def test_linear_extrapolates_by_a_negative_weight():
    merged = merge_tensors(recipe("linear", (-1, 2)), "w", [np.array([1.0, 2.0]), np.array([3.0, -2.0])])
    np.testing.assert_array_equal(merged, [5.0, -6.0])


# ---- slerp ----


def test_slerp_of_a_right_angle_goes_along_the_circle():
    """A third of the way from (1, 0) to (0, 1): 30 degrees."""
    merged = slerp(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1 / 3)
    np.testing.assert_allclose(merged, [math.sqrt(3) / 2, 0.5], rtol=1e-15)


def test_slerp_divides_the_angle_and_keeps_the_length():
    """Vectors of one length keep it, and the angles to both ends are t and 1 - t of the whole."""
    first, second = (x / np.linalg.norm(x) * 3 for x in draw((6, 5), 2, dtype=np.float64))
    for t in (0.1, 0.5, 0.8):
        merged = slerp(first, second, t)
        assert np.linalg.norm(merged) == pytest.approx(3, rel=1e-12)
        whole = math.acos((first * second).sum() / 9)
        assert math.acos((first * merged).sum() / 9) == pytest.approx(t * whole, rel=1e-9)
        assert math.acos((second * merged).sum() / 9) == pytest.approx((1 - t) * whole, rel=1e-9)


def test_slerp_at_the_ends_has_all_weight_there():
    assert slerp_weights(0.3, 0.0) == (1.0, 0.0)
    assert slerp_weights(0.3, 1.0) == (0.0, 1.0)


@pytest.mark.parametrize("second", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.001]])
def test_slerp_without_an_angle_is_linear(second):
    """Parallel, opposed, zero and nearly parallel tensors: the sphere's formula would divide by (almost) nothing."""
    first, second = np.array([1.0, 2.0]), np.array(second)
    np.testing.assert_allclose(slerp(first, second, 0.25), 0.75 * first + 0.25 * second, rtol=1e-15, atol=1e-15)


# ---- TIES (arXiv:2306.01708) ----


def ties_by_loop(base, tensors, weights, density, scale):
    """Algorithm 1 entry by entry: trim, elect signs, mean of those that agree; weighted by model."""
    flat = base.ravel()
    vectors = []
    for tensor in tensors:
        vector = tensor.ravel() - flat
        keep = sorted(range(vector.size), key=lambda p: (-abs(vector[p]), p))[: max(1, int(density * vector.size))]
        vectors.append([vector[p] if p in keep else 0.0 for p in range(vector.size)])
    merged = flat.copy()
    for p in range(flat.size):
        mass = sum(w * v[p] for w, v in zip(weights, vectors, strict=True))
        agree = [(w, v[p]) for w, v in zip(weights, vectors, strict=True) if v[p] * mass > 0]
        if agree:
            merged[p] += scale * sum(w * x for w, x in agree) / sum(w for w, _ in agree)
    return merged.reshape(base.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 1.5, 0.7)])
def test_ties_is_the_papers_algorithm(shape, density, weights):
    base, *tensors = draw(shape, 4, dtype=np.float64)
    merged = merge_tensors(recipe("ties", weights, density=density, scale=0.8), "w", tensors, base)
    np.testing.assert_allclose(merged, ties_by_loop(base, tensors, weights, density, 0.8), rtol=1e-12)


def test_ties_by_hand():
    """Half of 4 entries is kept: (3, -2) and (-4, 3). The first signs clash and -4 outweighs 3; no zero is averaged."""
    base, first = np.full(4, 10.0), np.array([13.0, 8.0, 10.1, 11.0])
    second = np.array([6.0, 11.0, 13.0, 10.5])
    merged = merge_tensors(recipe("ties", (1.0, 1.0), density=0.5), "w", [first, second], base)
    np.testing.assert_allclose(merged, [6.0, 8.0, 13.0, 10.0], rtol=1e-15)


def test_trim_keeps_the_largest_and_of_equals_the_first():
    vector = np.array([[1.0, -2.0, 2.0], [2.0, 0.5, -3.0]])
    np.testing.assert_array_equal(trim(vector, 0.5), [[0, -2, 2], [0, 0, -3]])
    np.testing.assert_array_equal(trim(vector, 0.01), [[0, 0, 0], [0, 0, -3]])  # at least one entry
    np.testing.assert_array_equal(trim(vector, 1.0), vector)


def test_signs_that_cancel_give_nothing():
    np.testing.assert_array_equal(disjoint_mean([np.array([1.0]), np.array([-1.0])], [1.0, 1.0]), [0.0])


# ---- DARE (arXiv:2311.03099) ----


def test_drop_keeps_a_share_and_rescales_it():
    """Of 40,000 entries a quarter stays, times 4: the sum is kept in expectation (5 standard deviations allowed)."""
    vector = np.ones((200, 200))
    kept = drop(vector, 0.25, np.random.default_rng(0))
    assert set(np.unique(kept)) == {0.0, 4.0}
    assert abs((kept > 0).mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / vector.size)


def test_dare_by_the_masks_that_were_drawn():
    """The kept entries of both task vectors are read from each alone; their sum and disjoint mean follow."""
    base, *tensors = draw((30, 20), 3, dtype=np.float64)
    alone = [
        merge_tensors(recipe("dare_linear", weights, density=0.3, seed=5), "w", tensors, base) - base
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    for vector, tensor in zip(alone, tensors, strict=True):
        kept = np.abs(vector) > 1e-12
        np.testing.assert_allclose(vector[kept], ((tensor - base) / 0.3)[kept], rtol=1e-9)
        assert 0.2 < kept.mean() < 0.4
    assert ((alone[0] == 0) != (alone[1] == 0)).any()  # each model has a mask of its own
    merged = merge_tensors(recipe("dare_linear", (0.5, 2.0), density=0.3, seed=5, scale=0.9), "w", tensors, base)
    np.testing.assert_allclose(merged, base + 0.9 * (0.5 * alone[0] + 2 * alone[1]), rtol=1e-9, atol=1e-12)
    merged = merge_tensors(recipe("dare_ties", (0.5, 2.0), density=0.3, seed=5), "w", tensors, base)
    expected = base + ties_by_loop(np.zeros_like(base), alone, (0.5, 2.0), 1.0, 1.0)
    np.testing.assert_allclose(merged, expected, rtol=1e-9, atol=1e-12)


def test_masks_depend_on_seed_tensor_and_nothing_else():
    base, *tensors = draw((40,), 3)
    merge = lambda name, seed: merge_tensors(recipe("dare_linear", (1, 1), seed=seed), name, tensors, base)  # noqa: E731
    np.testing.assert_array_equal(merge("a", 0), merge("a", 0))
    assert (merge("a", 0) != merge("b", 0)).any()
    assert (merge("a", 0) != merge("a", 1)).any()


# ---- what must hold for all ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_merged_with_itself_is_itself_to_the_bit(method, dtype):
    (tensor,) = draw((33, 5), 1, dtype=dtype)
    tensor[0, :2] = [-0.0, np.finfo(np.float16).smallest_subnormal]
    base = tensor if METHODS[method].needs_base else None
    merged = merge_tensors(recipe(method, (0.3, 0.6)), "w", [tensor, tensor.copy()], base)
    assert merged.dtype == dtype and merged.tobytes() == tensor.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("method", METHODS)
def test_all_weight_on_one_gives_it_to_the_bit(method, dtype):
    base, *tensors = draw((33, 5), 3, dtype=dtype)
    base = base if METHODS[method].needs_base else None
    values = {"density": 1.0} if METHODS[method].sparse else {}
    for weights, expected in (((2.0 if base is None else 1.0, 0.0), tensors[0]), ((0.0, 1.0), tensors[1])):
        merged = merge_tensors(recipe(method, weights, **values), "w", tensors, base)
        assert merged.tobytes() == expected.tobytes()


def test_without_anything_dropped_dare_is_task_arithmetic_and_ties():
    base, *tensors = draw((6, 4), 4, dtype=np.float64)
    weights, whole = (0.2, 0.9, 0.4), {"density": 1.0, "scale": 0.7}
    merged = merge_tensors(recipe("dare_linear", weights, **whole), "w", tensors, base)
    expected = base + 0.7 * sum(w * (t - base) for w, t in zip(weights, tensors, strict=True))
    np.testing.assert_allclose(merged, expected, rtol=1e-13)
    merged = merge_tensors(recipe("dare_ties", weights, **whole), "w", tensors, base)
    np.testing.assert_array_equal(merged, merge_tensors(recipe("ties", weights, **whole), "w", tensors, base))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dare_linear" and name != "dare_ties"])
def test_the_order_of_the_models_does_not_matter(method):
    base, *tensors = draw((6, 4), 3, dtype=np.float64)
    base = base if METHODS[method].needs_base else None
    one = merge_tensors(recipe(method, (0.2, 0.8)), "w", tensors, base)
    other = merge_tensors(recipe(method, (0.8, 0.2)), "w", tensors[::-1], base)
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_the_result_has_the_type_asked_for_and_is_rounded_once():
    """1 + 2^-9 lies between two bfloat16 values; the sum of both models is not rounded before it is halved."""
    tensors = [np.array([1.0], BFLOAT16), np.array([1 + 2**-7], BFLOAT16)]
    merged = merge_tensors(recipe("linear", (3, 1)), "w", tensors, dtype="float32")
    np.testing.assert_array_equal(merged, np.array([1 + 2**-9], np.float32))
    assert merge_tensors(recipe("linear", (1, 3)), "w", tensors).dtype == BFLOAT16


@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_a_block_does_not_matter(method):
    """Whole tensors at once, and a row at a time: to the bit, but for slerp, whose sums are in another order."""
    base, *tensors = (x.round(1) for x in draw((9, 4, 3), 3))  # many entries alike in magnitude
    base = base if METHODS[method].needs_base else None
    whole, rows = (
        merge_tensors(recipe(method, (0.2, 0.8)), "w", tensors, base, dtype="float64", block=n) for n in (10**6, 1)
    )
    np.testing.assert_allclose(rows, whole, rtol=1e-14 if method == "slerp" else 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_is_refused(method, value):
    """Also where the method would drop it."""
    base, *tensors = draw((3, 4), 3)
    base = base if METHODS[method].needs_base else None
    tensors[1][1, 2] = value
    with pytest.raises(CheckpointError, match="tensor w: model 2 holds a value that is not finite"):
        merge_tensors(recipe(method, (1, 1)), "w", tensors, base)
    if base is not None:
        with pytest.raises(CheckpointError, match="tensor w: the base holds a value that is not finite"):
            merge_tensors(recipe(method, (1, 1)), "w", [base, base], tensors[1])


def test_a_merged_value_beyond_the_type_is_refused():
    with pytest.raises(CheckpointError, match="tensor w: a merged value is more than float16 holds"):
        merge_tensors(recipe("linear", (1, 1)), "w", [np.array([1e6])] * 2, dtype="float16")


@pytest.mark.parametrize(
    "method, weights, values, words",
    [
        ("mean", (1, 1), {}, "method: 'mean' is unknown; there are linear, slerp, ties, dare_linear, dare_ties"),
        ("linear", (1,), {}, "models: linear merges at least 2, got 1"),
        ("slerp", (1, 1, 1), {}, "models: slerp merges exactly 2, got 3"),
        ("ties", (), {"density": 1.0}, "models: ties merges at least 1, got 0"),
        ("linear", (1, -1), {}, "weights: their sum is 0"),
        ("linear", (0.1, 0.2, -0.3), {}, "weights: their sum is 0"),  # 5.6e-17 in floating point
        ("ties", (0, 0), {"density": 1.0}, "weights: their sum is 0"),
        ("slerp", (1.5, -0.5), {}, "weights: -0.5 is negative"),
        ("ties", (1, -1), {"density": 1.0}, "weights: -1 is negative"),
        ("linear", (1, math.nan), {}, "weights: nan is not a finite number"),
        ("ties", (1, 1), {}, "density: missing; ties keeps this share"),
        ("ties", (1, 1), {"density": 0.0}, "density: 0.0 is out of range; expected 0 < density <= 1"),
        ("dare_ties", (1, 1), {"density": 1.1}, "density: 1.1 is out of range"),
        ("linear", (1, 1), {"density": 0.5}, "density: linear drops nothing"),
        ("slerp", (1, 1), {"scale": 0.5}, "scale: slerp has no task vectors"),
        ("ties", (1, 1), {"density": 0.5, "scale": math.inf}, "scale: inf is not a finite number"),
        ("ties", (1, 1), {"density": 0.5, "seed": 1}, "seed: ties draws nothing"),
        ("dare_ties", (1, 1), {"density": 0.5, "seed": -1}, "seed: -1 is negative"),
    ],
)
def test_recipes_that_are_refused(method, weights, values, words):
    with pytest.raises(ConfigError) as caught:
        Recipe(method, weights, **values)
    assert str(caught.value).startswith(words)
