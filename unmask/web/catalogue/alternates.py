"""What programs read instead of a page: JSON, JSON-LD, and the feeds' items."""

from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote

import msgspec

from unmask.catalogue.record import Price
from unmask.web.catalogue.model_view import Shown
from unmask.web.rendering import price


def as_json(shown: Shown) -> dict[str, Any]:
    """Everything that a model's page says, under the names that the record has for it."""
    figures = shown.figures
    return {
        **msgspec.to_builtins(shown.record),
        "standing": shown.standing,
        "state": shown.served.state if shown.served else None,
        "means": {
            f"{suite}, {origin}": {
                "mean": scores.mean,
                "tasks": len(scores.tasks),
                "of": scores.expected,
                "categories": {category.category: category.mean for category in scores.categories},
            }
            for (suite, origin), scores in figures.suites.items()
        },
        "measurements": msgspec.to_builtins(shown.entry.measurements),
    }


def linked_data(shown: Shown, base: str) -> dict[str, Any]:
    """schema.org's view of a model: what it is, its questions, and where its page lies."""
    record = shown.record
    address = f"{base}/models/{quote(record.id)}"
    application = {
        "@type": "SoftwareApplication",
        "@id": address,
        "name": record.name or record.id,
        "alternateName": record.id,
        "description": record.summary,
        "url": address,
        "applicationCategory": "DeveloperApplication",
        "applicationSubCategory": record.task,
        "operatingSystem": "Any",
        "license": record.licence,
        "author": {"@type": "Organization", "name": record.owned_by} if record.owned_by else None,
        "datePublished": record.published.isoformat() if record.published else None,
        "dateModified": record.updated.isoformat() if record.updated else None,
        "sameAs": [link.url for link in record.links] or None,
        "offers": [_offer(offer, available=shown.answers) for offer in record.prices] or None,
    }
    graph: list[dict[str, Any]] = [
        {name: value for name, value in application.items() if value is not None},
        {
            "@type": "BreadcrumbList",
            "itemListElement": [
                {"@type": "ListItem", "position": 1, "name": "Models", "item": f"{base}/models"},
                {"@type": "ListItem", "position": 2, "name": record.name or record.id, "item": address},
            ],
        },
    ]
    if record.faq:
        graph.append(
            {
                "@type": "FAQPage",
                "mainEntity": [
                    {
                        "@type": "Question",
                        "name": item.question,
                        "acceptedAnswer": {"@type": "Answer", "text": item.answer},
                    }
                    for item in record.faq
                ],
            }
        )
    return {"@context": "https://schema.org", "@graph": graph}


@dataclass(frozen=True)
class News:
    """A model that is new here or has changed."""

    shown: Shown
    on: date
    title: str
    text: str


def news(models: list[Shown], most: int = 50) -> list[News]:
    """What happened to the models, newest first."""
    items = []
    for shown in models:
        name = shown.record.name or shown.record.id
        items += [News(shown, event.on, f"{name}: {event.status}", event.note) for event in shown.record.history]
        items += [News(shown, change.on, f"{name}: changed", change.note) for change in shown.record.changes]
    items.sort(key=lambda item: item.on, reverse=True)
    return items[:most]


def changed_on(shown: Shown) -> date | None:
    """The last day on which anything about a record became different."""
    record = shown.record
    days = [event.on for event in record.history] + [change.on for change in record.changes]
    days += [m.on for m in shown.entry.measurements if m.on and m.origin == "measured"]
    return max(days, default=None)


def _offer(offer: Price, *, available: bool) -> dict[str, Any]:
    return {
        "@type": "Offer",
        "name": offer.tier,
        "price": price(offer).lstrip("~$").replace(",", ""),
        "priceCurrency": "USD",
        "availability": "https://schema.org/InStock" if available else "https://schema.org/PreOrder",
    }
