"""Codebooks by name."""

import pytest

from qlora_lib.numerics import (
    DYNAMIC8,
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    TOY,
    codebook_by_name,
    dynamic,
    integer,
    normal_float,
)

CONSTANTS = [TOY, INT4, FP4, FP4_E3M0, FP4_BITSANDBYTES, NF4, DYNAMIC8]


@pytest.mark.parametrize("codebook", CONSTANTS, ids=lambda codebook: codebook.name)
def test_a_constant_is_found_by_its_name(codebook):
    assert codebook_by_name(codebook.name) is codebook


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("make", [normal_float, integer, dynamic])
def test_a_family_is_found_by_its_names(make, bits):
    codebook = make(bits)
    found = codebook_by_name(codebook.name)
    assert found == codebook
    assert found.name == codebook.name
    assert codebook_by_name(codebook.name) is found  # one table for all layers


@pytest.mark.parametrize("name", ["nf9", "nf1", "NF4", "fp4", "", "int", "nf04"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"got {name!r}: use one of .*nf4") as error:
        codebook_by_name(name)
    assert "fp4_bitsandbytes" in str(error.value)
