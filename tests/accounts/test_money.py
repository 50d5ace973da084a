"""Amounts: exact both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.accounts.money import cost, format_dollars, parse_dollars


@given(st.integers(0, 10**17))
def test_there_and_back(nano: int):
    assert parse_dollars(format_dollars(nano)) == nano


@pytest.mark.parametrize(
    ("text", "nano"), [("12.50", 12_500_000_000), ("$0.008", 8_000_000), ("1", 10**9), ("0.000000008", 8)]
)
def test_dollars(text: str, nano: int):
    assert parse_dollars(text) == nano


@pytest.mark.parametrize("text", ["", "-1", "1e3", "nan", "1.0000000001", "1,5", "١", ".5", "1."])
def test_no_dollars(text: str):
    with pytest.raises(ValueError, match=r"12\.50"):
        parse_dollars(text)


def test_below_zero_is_shown():
    assert format_dollars(-8) == "-0.000000008"


@pytest.mark.parametrize(("tokens", "price", "nano"), [(0, 8, 0), (1, 1, 1), (1_000_000, 1, 1), (1_000_001, 1, 2)])
def test_a_part_of_a_nano_dollar_counts_whole(tokens: int, price: int, nano: int):
    assert cost(tokens, price) == nano
