"""Replica groups in every form that XLA prints, and the mesh axes that they run over."""

import itertools

import numpy as np
import pytest

from jaxpost.plan.groups import UNKNOWN, Axes, parse_groups

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


def groups_over(axes):
    """Of the 16 devices of MESH, by a loop over coordinates."""
    sizes, found = list(MESH.values()), {}
    for place in itertools.product(*map(range, sizes)):
        device = (place[0] * 4 + place[1]) * 2 + place[2]
        kept = tuple(at for at, name in zip(place, MESH, strict=True) if name not in axes)
        found.setdefault(kept, []).append(device)
    return list(found.values())


@pytest.mark.parametrize(
    "text, axes",
    [
        ("{{0,2,4,6},{8,10,12,14},{1,3,5,7},{9,11,13,15}}", ("fsdp",)),
        ("[8,2]<=[16]", ("tensor",)),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("[8,2]<=[2,4,2]T(2,1,0)", ("data",)),
        ("[2,8]<=[8,2]T(1,0)", ("data", "fsdp")),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", ("data", "tensor")),
        ("mesh['axis_0'=16] {'axis_0':(2)4}", ("fsdp",)),
        ("mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'x'}", ("tensor",)),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_every_form_is_read(text, axes):
    as_sets = {frozenset(group) for group in parse_groups(text, 16)}
    assert as_sets == {frozenset(group) for group in groups_over(axes)}
    assert Axes(MESH, 16).of_groups(text) == (axes, int(np.prod([MESH[name] for name in axes])))


def test_explicit_device_ids_reorder_the_mesh():
    assert parse_groups("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", 4) == [[0, 2], [1, 3]]


def test_part_of_an_axis_is_named_by_the_axis():
    assert Axes(MESH, 16).of_groups("{{0,2},{4,6},{8,10},{12,14},{1,3},{5,7},{9,11},{13,15}}") == (("fsdp",), 2)


def test_axes_of_one_device_are_never_named():
    assert Axes({"data": 1, "fsdp": 4}, 4).of_groups("{{0,1,2,3}}") == (("fsdp",), 4)


@pytest.mark.parametrize("text", ["<a new form>", "{{0,1},{2,99}}"])
def test_what_is_not_understood_is_said(text):
    assert Axes(MESH, 16).of_groups(text)[0] == UNKNOWN


def test_pairs_of_permutes():
    axes = Axes(MESH, 16)
    assert axes.of_pairs("{{0,2},{2,4},{4,6},{6,0}}") == ("fsdp",)
    assert axes.of_pairs("{{0,9},{9,0}}") == ("data", "tensor")
    assert axes.of_pairs("{{0,0},{1,1}}") == ()


def test_a_slices_program_counts_the_devices_of_a_slice():
    """data is 4: two slices, each with two of them; the groups of the program know 8 of the 16 devices."""
    axes = Axes({"data": 4, "fsdp": 4}, 8)
    assert (axes.across, axes.slices) == (("data",), 2)
    assert axes.of_groups("{{0,1,2,3},{4,5,6,7}}") == (("fsdp",), 4)
    assert axes.of_groups("[4,2]<=[2,4]T(1,0)") == (("data",), 2)
