"""What a model costs here: what is charged comes before what was proposed."""

import pytest

from unmask.accounts.tariff import Price as Charged
from unmask.catalogue import Record
from unmask.catalogue.pricing import prices_here
from unmask.catalogue.record import Price

ESTIMATE = Price(nanodollars_per_million_tokens=5, estimated=True)
OLD = Price(nanodollars_per_million_tokens=9)


@pytest.mark.parametrize(
    ("charged", "expected"),
    [
        ([], [ESTIMATE]),
        ([Charged("m", "default", 8)], [("standard", 8)]),
        ([Charged("m", "default", 8), Charged("m", "batch", 4)], [("standard", 8), ("batch", 4)]),
        ([Charged("m", "default", 8), Charged("m", "batch", 8)], [("standard", 8)]),
        ([Charged("*", "default", 7), Charged("*", "batch", 3)], [("standard", 7), ("batch", 3)]),
        ([Charged("m", "default", 8), Charged("*", "batch", 3)], [("standard", 8)]),
        ([Charged("other", "default", 8)], [ESTIMATE]),
        ([Charged("m", "default", 0)], [("standard", 0)]),
        ([Charged("m", "batch", 4)], [("batch", 4)]),
    ],
)
def test_what_is_charged_is_shown(charged: list[Charged], expected: list[tuple[str, int] | Price]) -> None:
    prices = prices_here(Record(id="m", prices=(ESTIMATE, OLD)), charged)
    assert [
        price if price.estimated else (price.tier, price.nanodollars_per_million_tokens) for price in prices
    ] == expected
