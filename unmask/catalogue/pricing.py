"""Prices of a model on this server, as pages and API show them."""

from collections.abc import Sequence

from unmask.accounts import tariff
from unmask.catalogue.record import Price, Record

# Tier of the tariff -> its name in the record of a model.
_NAMES = {"default": "standard", "batch": "batch"}


def charged_prices(record: Record, charged: Sequence[tariff.TariffPrice]) -> tuple[Price, ...]:
    """Return the prices of a model on a server with accounts: those that are charged.

    A tier is listed only if it costs something else than the standard one. A model without a price answers nobody
    yet; its proposed price is then shown as an estimate.

    Args:
        record: of the model; its prices are the proposed ones.
        charged: all prices that the operator has set.
    """
    standard = tariff.effective_price(charged, record.id, "default")
    amounts = {tier: tariff.effective_price(charged, record.id, tier) for tier in tariff.TIERS}
    prices = tuple(
        Price(tier=_NAMES[tier], nanodollars_per_million_tokens=amount)
        for tier, amount in amounts.items()
        if amount is not None and (tier == "default" or amount != standard)
    )
    return prices or tuple(price for price in record.prices if price.estimated)
