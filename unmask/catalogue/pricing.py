"""What a model costs here, as visitors and callers are told it."""

from collections.abc import Sequence

from unmask.accounts import tariff
from unmask.catalogue.record import Price, Record

# What the record of a model calls the tiers of the tariff.
_NAMES = {"default": "standard", "batch": "batch"}


def charged_prices(record: Record, charged: Sequence[tariff.TariffPrice]) -> tuple[Price, ...]:
    """The prices of a model that answers on a server with accounts: those that are charged.

    A tier is named only where it costs something else than the standard one. A model without a price answers nobody
    yet; what was proposed for it goes on being shown as an estimate.

    Args:
        record: of the model; the prices in it are what was proposed.
        charged: every price that the operator has set.
    """
    standard = tariff.effective_price(charged, record.id, "default")
    amounts = {tier: tariff.effective_price(charged, record.id, tier) for tier in tariff.TIERS}
    prices = tuple(
        Price(tier=_NAMES[tier], nanodollars_per_million_tokens=amount)
        for tier, amount in amounts.items()
        if amount is not None and (tier == "default" or amount != standard)
    )
    return prices or tuple(price for price in record.prices if price.estimated)
