"""`unmask providers ...`: who answers for models elsewhere, and whether their vectors are right."""

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from unmask.accounts.money import format_dollars
from unmask.catalogue import record_for
from unmask.catalogue.store import read_catalogue
from unmask.cli.database import DatabaseUrl, open_database
from unmask.cli.options import AsJson
from unmask.errors import UsageError
from unmask.router.checks import ModelSource, check_all
from unmask.router.providers import Providers, read_providers
from unmask.storage.database import Database
from unmask.terminal import print_json, print_table, say

providers = App(name="providers", help="Manage providers of models, and check their vectors.")

ProvidersPath = Annotated[
    Path,
    Parameter(name="--providers", env_var="UNMASK_PROVIDERS", help="File of providers, see the how-to guide."),
]


@providers.command(name="list")
def list_providers(*, file: ProvidersPath = Path("providers.toml"), as_json: AsJson = False) -> int:
    """Check the file of providers and list what it says."""
    today = datetime.now(UTC).date()
    rows = [
        (
            provider.name,
            provider.kind,
            model.id,
            model.precision,
            format_dollars(model.cost_on(today)),
            model.priority,
            provider.inputs_per_request(model),
            model.max_tokens,
            provider.data,
            provider.country,
        )
        for provider in read_providers(file).providers
        for model in provider.models
    ]
    headings = ("provider", "kind", "model", "precision", "dollars", "priority", "texts", "tokens", "data", "country")
    print_table(headings, rows, right=("dollars", "priority", "texts", "tokens"), as_json=as_json)
    return 0


@providers.command
def check(
    name: str = "",
    /,
    *,
    file: ProvidersPath = Path("providers.toml"),
    weights: tuple[str, ...] = (),
    as_json: AsJson = False,
    database: DatabaseUrl = None,
) -> int:
    """Ask providers for all canary texts and compare their vectors with this machine's own.

    The right vectors are computed here once per model and kept in UNMASK_HOME. Exit code 2: a provider's vectors are
    wrong, or it did not answer.

    Parameters
    ----------
    name
        Name of one provider. Default: all of the file.
    weights
        Folder or file with a model's weights, if its id does not say where they are. Repeat it for several models.
    """
    chosen = _chosen(read_providers(file), name)
    with closing(open_database(database)) as opened:
        sources = _sources(opened, weights)
    results = asyncio.run(check_all(chosen, sources, say))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        headings = ("provider", "model", "verdict", "precision", "worst", "mean", "finding")
        rows = [
            (
                result.provider,
                result.model,
                "right" if result.passed else "no answer" if result.finding is None else "wrong",
                result.finding.precision if result.finding else None,
                f"{result.finding.worst:.1e}" if result.finding else None,
                f"{result.finding.mean:.1e}" if result.finding else None,
                result.sentence,
            )
            for result in results
        ]
        print_table(headings, rows, right=("worst", "mean"))
    return 0 if all(result.passed for result in results) else 2


def _chosen(file: Providers, name: str) -> Providers:
    """Return the providers to check."""
    if not name:
        return file
    matching = tuple(provider for provider in file.providers if provider.name == name)
    if not matching:
        names = ", ".join(provider.name for provider in file.providers) or "none"
        raise UsageError(f"there is no provider {name!r} in the file, only {names}")
    return Providers(providers=matching)


def _sources(database: Database, weights: Sequence[str]) -> dict[str, ModelSource]:
    """Return model id -> weights and text handling, for models whose id does not say where the weights are."""
    with database.read() as connection:
        stored = read_catalogue(connection)
    sources = {
        entry.record.id: ModelSource(stored.sources.get(entry.record.id, entry.record.id), entry.record.compat)
        for entry in stored.catalogue.entries()
    }
    for place in weights:
        record = record_for(place)
        sources[record.id] = ModelSource(place, record.compat)
    return sources
