"""`build_application`: every part of a server, built in one place from its settings."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp

from unmask.accounts import Accounts, costs
from unmask.accounts.limits import SharedLimiter
from unmask.api import ServeSettings, create_app
from unmask.api.metrics import Metrics
from unmask.catalogue.store import open_database, read_catalogue
from unmask.errors import UsageError
from unmask.router import (
    CatalogueSync,
    ModelOptions,
    ModelRegistry,
    ProviderPool,
    retired_models,
    sources_of_answering_models,
)
from unmask.router.checks import ModelSource, RemoteModel
from unmask.router.verdicts import Verdict, add_verdict, last_reload, read_verdicts
from unmask.server.notices import NoticeMailer
from unmask.storage.database import Database

log = logging.getLogger("unmask")


@dataclass(frozen=True, eq=False)
class Application:
    """The parts of one server.

    Attributes:
        app: the ASGI app: API and pages.
        models: the served models.
        sync: keeps the models in step with the catalogue; None without a database.
        accounts: None for a server without them.
        database: holds the catalogue, and the accounts if there are any.
        stopping: to be set when the server begins to shut down.
    """

    app: ASGIApp
    models: ModelRegistry
    sync: CatalogueSync | None
    accounts: Accounts | None
    database: Database | None
    stopping: threading.Event

    def close(self) -> None:
        """Close the accounts and the database. The models are closed by `serve_models`."""
        if self.accounts is not None:
            self.accounts.close()
        elif self.database is not None:
            self.database.close()


def build_application(settings: ServeSettings) -> Application:
    """Build all parts of a server, and begin to load its warm models.

    Raises:
        UsageError, CheckpointError: the name or the files of a model are wrong.
        UsageError, StorageError: the database, the pepper or the Redis of the accounts is.
    """
    accounts = open_accounts(settings)
    database = accounts.database if accounts is not None else None
    if database is None and settings.catalogue is not None:
        database = open_database(settings.catalogue)
    stopping = threading.Event()
    models, sync = open_models(settings, database, stopping)
    if settings.providers_file is not None:
        models.providers = open_providers(
            settings.providers_file, models, database, hides_names=settings.hide_providers
        )
        if accounts is not None:
            book_providers(models.providers, accounts)
    models.preload()
    from unmask.web import website  # takes a while to import, and the first model is being loaded meanwhile

    metrics = Metrics()
    pages = website(models, settings, metrics, accounts)
    app = create_app(models, settings, metrics=metrics, stopping=stopping, accounts=accounts, pages=pages)
    return Application(app, models, sync, accounts, database, stopping)


def open_accounts(settings: ServeSettings) -> Accounts | None:
    """Open the accounts; None if the settings name no database for them.

    Raises:
        UsageError, StorageError: the database, the pepper or the Redis is wrong or cannot be reached.
    """
    if settings.accounts_url is None:
        return None
    redis, on_failure = settings.limits_url, settings.on_redis_failure
    return Accounts(
        settings.accounts_url,
        limiter=SharedLimiter(redis, on_redis_failure=on_failure) if redis else None,
        free_credit=settings.free_credit,
        flush_charges=settings.flush_charges,
        provider=settings.identity_provider,
    )


def open_providers(
    file: Path, models: ModelRegistry, database: Database | None, *, hides_names: bool = False
) -> ProviderPool:
    """Open the providers of a file. They are watched and used once the event loop runs.

    Args:
        file: the file.
        models: the served models.
        database: keeps quarantines, for all processes and for the next start; None for this process alone.
        hides_names: callers see letters in place of the providers' names.

    Raises:
        UsageError: the file is wrong, or names a model that is not served.
    """

    def source_of(model: str) -> ModelSource:
        served = models.find(model)
        return ModelSource(model) if served is None else ModelSource(served.source, served.record.compat)

    def report(verdict: Verdict) -> int:
        if database is None:
            return 0
        with database.begin() as connection:
            return add_verdict(connection, verdict)

    def take_model(id: str, opened: RemoteModel) -> None:
        if (served := models.find(id)) is not None:
            served.take_files(opened.checkpoint.encoder_config, opened.references)

    pool = ProviderPool(file, source_of, report, take_model, hides_names=hides_names)
    if database is not None:
        with database.read() as connection:
            pool.take_verdicts(read_verdicts(connection))
            pool.last_reload = last_reload(connection)
    for provider in pool.settings.providers:
        for model in provider.models:
            served = models.find(model.id)
            if served is None or served.record.id != model.id:
                ids = ", ".join(served.record.id for served in models.list())
                raise UsageError(f"{file}: {provider.name} has the model {model.id}, but this server serves {ids}")
    return pool


def book_providers(pool: ProviderPool, accounts: Accounts) -> None:
    """Let a pool write its attempts into the books, and read what providers have cost from them."""

    def costs_since(start: int) -> dict[str, int]:
        with accounts.database.read() as connection:
            return costs.costs_since(connection, start)

    pool.record_attempts, pool.costs_since = accounts.record_attempts, costs_since


def open_models(
    settings: ServeSettings, database: Database | None, stopping: threading.Event
) -> tuple[ModelRegistry, CatalogueSync | None]:
    """Open the models that the settings name and those that the operator took live.

    Args:
        settings: names, and the options of every model.
        database: holds the operator's side of the catalogue; without it, only the shipped records are known.
        stopping: set when the server begins to shut down.

    Returns:
        The models, and the sync that keeps them in step with the database.

    Raises:
        UsageError: the name of a model is wrong, or the catalogue cannot be read.
    """
    options = ModelOptions(
        queue_tokens=settings.queue_tokens,
        cache_bytes=settings.cache_bytes,
        dtype=settings.dtype,
        device=settings.device,
        replicas=settings.replica_options(),
    )
    if database is None:
        return ModelRegistry(settings.models, warm=settings.warm, options=options), None
    with database.read() as connection:
        stored = read_catalogue(connection)
    retired = retired_models(stored)
    for name in retired.intersection(settings.models):
        log.warning("%s is retired and answers nobody: 'unmask catalogue announce %s' takes it up again", name, name)
    models = ModelRegistry(
        [name for name in settings.models if name not in retired],
        warm=[name for name in settings.warm if name not in retired],
        options=options,
        catalogue=stored.catalogue,
        sources=stored.sources,
    )
    for id, source in sources_of_answering_models(stored).items():
        entry = stored.catalogue.get(id)
        if models.find(id) is None and entry is not None:
            models.add(source, entry.record)
    on_live = (lambda: None) if settings.mail is None else NoticeMailer(database, settings.mail, stopping).send
    return models, CatalogueSync(models, database, stored.version, grace=settings.shutdown_grace_s, on_live=on_live)
