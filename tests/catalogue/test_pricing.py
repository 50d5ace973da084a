"""Price of a model on the pages: the charged price comes before the proposed one."""

import pytest

from unmask.accounts.tariff import TariffPrice
from unmask.catalogue import Record
from unmask.catalogue.pricing import charged_prices
from unmask.catalogue.record import Price

ESTIMATE = Price(nanodollars_per_million_tokens=5, estimated=True)
OLD = Price(nanodollars_per_million_tokens=9)


@pytest.mark.parametrize(
    ("charged", "expected"),
    [
        ([], [ESTIMATE]),
        ([TariffPrice("m", "default", 8)], [("standard", 8)]),
        ([TariffPrice("m", "default", 8), TariffPrice("m", "batch", 4)], [("standard", 8), ("batch", 4)]),
        ([TariffPrice("m", "default", 8), TariffPrice("m", "batch", 8)], [("standard", 8)]),
        ([TariffPrice("*", "default", 7), TariffPrice("*", "batch", 3)], [("standard", 7), ("batch", 3)]),
        ([TariffPrice("m", "default", 8), TariffPrice("*", "batch", 3)], [("standard", 8)]),
        ([TariffPrice("other", "default", 8)], [ESTIMATE]),
        ([TariffPrice("m", "default", 0)], [("standard", 0)]),
        ([TariffPrice("m", "batch", 4)], [("batch", 4)]),
    ],
)
def test_what_is_charged_is_shown(charged: list[TariffPrice], expected: list[tuple[str, int] | Price]) -> None:
    prices = charged_prices(Record(id="m", prices=(ESTIMATE, OLD)), charged)
    assert [
        price if price.estimated else (price.tier, price.nanodollars_per_million_tokens) for price in prices
    ] == expected
