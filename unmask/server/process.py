"""`serve`: run a server in this process until a signal ends it."""

import asyncio
import logging
import os
import socket
import sys
from contextlib import nullcontext

from unmask.api.logs import configure_logging
from unmask.api.settings import ServeSettings
from unmask.cluster.connection import LOST, connected
from unmask.router import CatalogueSync, ModelRegistry
from unmask.router.providers import read_providers
from unmask.server.announcement import announce, create_invitation
from unmask.server.cluster_watch import ClusterWatch
from unmask.server.composition import build_application
from unmask.server.hangup import ignore_hangups, on_hangup
from unmask.server.http_server import HttpServer, base_url, listen

log = logging.getLogger("unmask")


def serve(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Exit code of the process: 0 after an orderly end, 1 if the address cannot be listened on.

    Raises:
        UsageError, ClusterError: see `connected`.
        UsageError, CheckpointError, StorageError: see `build_application`.
    """
    ignore_hangups()
    secrets = (settings.identity_provider.client_secret,) if settings.identity_provider else ()
    if settings.providers_file is not None:
        secrets += read_providers(settings.providers_file).keys()
    configure_logging(settings.log_level, (*settings.api_keys, *secrets))
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        sys.stderr.write(f"cannot listen on {settings.host} port {settings.port}: {reason}. Choose another port.\n")
        return 1
    # Connected here, in the main thread, so that Ray's handler of SIGTERM comes before the server's own.
    with listener, connected(settings.cluster) if settings.cluster is not None else nullcontext() as ray:
        url = base_url(listener)
        built = build_application(settings)
        accounts = built.accounts
        invitation = create_invitation(accounts, settings.public_url or url) if accounts is not None else None

        def ready() -> None:
            announce(url, built.models, settings, accounts, invitation)

        server = HttpServer(built.app, settings, built.stopping, ready)
        watch = ClusterWatch(ray, settings.cluster, built.models) if settings.cluster is not None else None
        try:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(serve_models(built.models, server, listener, built.sync, watch))
        finally:
            built.close()
    return 0


async def serve_models(
    models: ModelRegistry,
    server: HttpServer,
    listener: socket.socket,
    sync: CatalogueSync | None = None,
    watch: ClusterWatch | None = None,
) -> None:
    """Start the models, serve until the server stops, and close the models after their last request."""
    await models.start_loading()
    if models.providers is not None:
        models.providers.start()
    reload_on_hangup(models)
    background = [asyncio.create_task(task.run()) for task in (sync, watch) if task is not None]
    try:
        await server.serve([listener])
    finally:
        for task in background:
            task.cancel()
        LOST.set()  # no request is left that would wait for a replica to load
        try:
            await models.close(server.grace_left())
        finally:
            LOST.clear()


def reload_on_hangup(models: ModelRegistry) -> None:
    """Read the file of providers and the files of the models again on SIGHUP. Files that are wrong change nothing."""

    def reload() -> None:
        if models.providers is not None:
            models.providers.try_reload()
        models.renew()

    loop = asyncio.get_running_loop()

    def reload_soon() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(reload)

    on_hangup(reload_soon)
