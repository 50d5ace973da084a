"""Formats for programs: a model as JSON and as JSON-LD, and the items of the RSS feed."""

from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote

import msgspec

from unmask.catalogue.record import Price
from unmask.web.catalogue.model_view import ModelView
from unmask.web.rendering import format_price


def model_json(view: ModelView) -> dict[str, Any]:
    """Return everything that a model's page says, under the field names of the record."""
    figures = view.figures
    return {
        **msgspec.to_builtins(view.record),
        "display_status": view.display_status,
        "state": view.served.state if view.served else None,
        "means": {
            f"{suite}, {origin}": {
                "mean": scores.mean,
                "tasks": len(scores.tasks),
                "of": scores.expected,
                "categories": {category.category: category.mean for category in scores.categories},
            }
            for (suite, origin), scores in figures.suites.items()
        },
        "measurements": msgspec.to_builtins(view.entry.measurements),
    }


def linked_data(view: ModelView, base: str) -> dict[str, Any]:
    """Return a model in the vocabulary of schema.org: application, breadcrumb and questions, for search engines."""
    record = view.record
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
        "offers": [_offer(offer, available=view.is_served) for offer in record.prices] or None,
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
        questions = [
            {
                "@type": "Question",
                "name": item.question,
                "acceptedAnswer": {"@type": "Answer", "text": item.answer},
            }
            for item in record.faq
        ]
        graph.append({"@type": "FAQPage", "mainEntity": questions})
    return {"@context": "https://schema.org", "@graph": graph}


@dataclass(frozen=True)
class FeedItem:
    """An event in the life of a model, or a change of its record."""

    view: ModelView
    on: date
    title: str
    text: str


def feed_items(models: list[ModelView], most: int = 50) -> list[FeedItem]:
    """List the events and changes of all models, newest first."""
    items = []
    for view in models:
        name = view.record.name or view.record.id
        items += [FeedItem(view, event.on, f"{name}: {event.status}", event.note) for event in view.record.history]
        items += [FeedItem(view, change.on, f"{name}: changed", change.note) for change in view.record.changes]
    items.sort(key=lambda item: item.on, reverse=True)
    return items[:most]


def last_change(view: ModelView) -> date | None:
    """Return the last day on which an event, a change or a measurement of ours was added."""
    record = view.record
    days = [event.on for event in record.history] + [change.on for change in record.changes]
    days += [m.on for m in view.entry.measurements if m.on and m.origin == "measured"]
    return max(days, default=None)


def _offer(offer: Price, *, available: bool) -> dict[str, Any]:
    return {
        "@type": "Offer",
        "name": offer.tier,
        "price": format_price(offer).lstrip("~$").replace(",", ""),
        "priceCurrency": "USD",
        "availability": "https://schema.org/InStock" if available else "https://schema.org/PreOrder",
    }
