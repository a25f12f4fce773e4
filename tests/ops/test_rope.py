import math

import numpy as np
import pytest

from jaxpost.ops.rope import Rope, apply_rope, inverse_frequencies, rope_tables

LLAMA3 = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def test_default_frequencies_by_hand():
    np.testing.assert_allclose(inverse_frequencies(Rope(100.0), 4), [1.0, 0.1], rtol=1e-7)


def test_linear_scaling_divides_every_frequency():
    plain, scaled = inverse_frequencies(Rope(100.0), 8), inverse_frequencies(Rope(100.0, "linear", 4.0), 8)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_llama3_scaling_band_by_band():
    """The three bands of Llama 3.1, one frequency at a time."""
    bands = set()
    for i, found in enumerate(inverse_frequencies(LLAMA3, 128)):
        frequency = LLAMA3.theta ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < LLAMA3.original_max_positions / LLAMA3.high_freq_factor:
            band, expected = "short", frequency
        elif wavelength > LLAMA3.original_max_positions / LLAMA3.low_freq_factor:
            band, expected = "long", frequency / LLAMA3.factor
        else:
            turns = LLAMA3.original_max_positions / wavelength
            smooth = (turns - LLAMA3.low_freq_factor) / (LLAMA3.high_freq_factor - LLAMA3.low_freq_factor)
            band, expected = "between", (1 - smooth) * frequency / LLAMA3.factor + smooth * frequency
        bands.add(band)
        assert found == pytest.approx(expected, rel=1e-6)
    assert bands == {"short", "between", "long"}


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'yarn'"):
        inverse_frequencies(Rope(kind="yarn"), 8)


def test_rotation_is_a_complex_product():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    rotated = apply_rope(x, rope_tables(Rope(), 8, positions))
    turn = np.exp(1j * positions[..., None] * inverse_frequencies(Rope(), 8).astype(np.float64))[:, :, None]
    z = (x[..., :4] + 1j * x[..., 4:]) * turn
    np.testing.assert_allclose(rotated, np.concatenate([z.real, z.imag], -1), atol=1e-4)


def test_scores_depend_on_distance_alone():
    q, k = (np.random.default_rng(seed).normal(size=(1, 1, 1, 8)).astype(np.float32) for seed in (1, 2))

    def score(at_q, at_k):
        return float((place(q, at_q) * place(k, at_k)).sum())

    def place(x, at):
        return np.asarray(apply_rope(x, rope_tables(LLAMA3, 8, np.array([[at]], np.int32))))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
