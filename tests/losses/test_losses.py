"""Losses against hand arithmetic; reference values are in tests/parity/oracles.py."""

import doctest
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import losses
from jaxpost.losses import preference, sft
from tests.parity.oracles import check_file
from tests.shared import SHARED, needs_shared


@pytest.mark.parametrize("module", [preference, sft])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_sigmoid_by_hand():
    policy = losses.PairLogps(jnp.array([-3.0]), jnp.array([-4.0]))
    reference = losses.PairLogps(jnp.array([-3.5]), jnp.array([-3.0]))
    margin = 0.2 * ((-3.0 + 3.5) - (-4.0 + 3.0))
    likely, unlikely = -math.log(1 / (1 + math.exp(-margin))), -math.log(1 / (1 + math.exp(margin)))
    np.testing.assert_allclose(losses.dpo(policy, reference, beta=0.2), [likely], rtol=1e-6)
    smooth = losses.dpo(policy, reference, beta=0.2, label_smoothing=0.1)
    np.testing.assert_allclose(smooth, [0.9 * likely + 0.1 * unlikely], rtol=1e-6)


@needs_shared
@pytest.mark.parametrize("name", ["dpo", "sft", "fused_lm_head"])
def test_reference_values(name):
    """Every case that something of ours computes passes; all of sft and fused_lm_head, and DPO's sigmoid."""
    import jax

    with jax.enable_x64(True):
        verdicts = check_file(SHARED / "oracle" / f"{name}.npz")
    wanted = {c["id"] for c in json.loads((SHARED / "oracle" / f"{name}.json").read_text())["cases"]}
    if name == "dpo":
        wanted = {case for case in wanted if case in ("sigmoid_b0.1", "sigmoid_b0.5", "sigmoid_ld1.0")}
        assert len(wanted) == 3
    assert {case: verdicts[case] for case in wanted} == dict.fromkeys(wanted, "passed")
    assert not [said for said in verdicts.values() if said.startswith("failed")]
