"""`unmask serve` and the models that it can serve."""

from typing import Annotated, Literal

from cyclopts import Group, Parameter

from unmask.cli.program import app, say

_LIMITS = Group("Limits")


@app.command
def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    model: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    warm: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    api_key_file: str | None = None,
    public_url: str | None = None,
    playground: bool | None = None,
    request_timeout: Annotated[float, Parameter(group=_LIMITS)] = 60.0,
    body_limit_mb: Annotated[float, Parameter(group=_LIMITS)] = 32.0,
    queue_tokens: Annotated[int, Parameter(group=_LIMITS)] = 262_144,
    cache_mb: Annotated[float, Parameter(group=_LIMITS)] = 64.0,
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> int:
    """Answer POST /v1/embeddings for one or more models, and show them on pages.

    Parameters
    ----------
    host
        Address to listen on. Anything but this machine's own needs --api-key-file.
    port
        Port to listen on; 0 lets the system choose.
    model
        Model to serve: a shipped id, a hub id, a folder or a .gguf file. May be repeated.
        The first is loaded at start. Left out: unmask/smollm2-135m-embed.
    warm
        Another model to load at start rather than on first use. May be repeated.
    api_key_file
        File with one API key per line; callers must present one as "Authorization: Bearer KEY".
    public_url
        Address under which visitors reach this server, for the links and examples on its pages.
        Left out: what their browsers say.
    playground
        Whether visitors may try models on the pages. Left out: only where no key is needed.
    request_timeout
        Seconds a request may take when its client names no deadline.
    body_limit_mb
        Largest request body, in megabytes.
    queue_tokens
        Tokens that may wait per model before requests are refused with 429.
    cache_mb
        Memory per model, in megabytes, for vectors of inputs that were asked for before; 0 for none.
    log_level
        What is logged to stderr.
    """
    from unmask.api.server import serve as run_server
    from unmask.api.settings import ServeSettings
    from unmask.checkpoint.resolve import DEFAULT_MODEL
    from unmask.web import website

    models = model or (DEFAULT_MODEL,)
    return run_server(
        ServeSettings(
            host=host,
            port=port,
            models=models,
            warm=(models[0], *warm),
            api_keys=_read_keys(api_key_file) if api_key_file else (),
            public_url=public_url,
            playground=playground,
            request_timeout_s=request_timeout,
            body_limit_bytes=int(body_limit_mb * 1_000_000),
            queue_tokens=queue_tokens,
            cache_bytes=int(cache_mb * 1_000_000),
            log_level=log_level,
        ),
        website,
    )


@app.command
def models() -> int:
    """List the models that ship, and what is already stored on this machine."""
    from rich.console import Console
    from rich.table import Table

    from unmask.catalogue import shipped_records
    from unmask.home import home

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in ("dimensions", "tokens", "licence", "stored", "summary"):
        table.add_column(heading)
    for record in shipped_records().values():
        stored = any((home() / "models" / record.id).glob("*.gguf"))
        row = (record.id, record.dimensions, record.max_tokens, record.licence, "yes" if stored else "no")
        table.add_row(*("?" if value is None else str(value) for value in row), record.summary)
    Console().print(table)
    say("Any hub id, folder in the hub's layout or .gguf file can be named as well.")
    return 0


def _read_keys(path: str) -> tuple[str, ...]:
    from pathlib import Path

    from unmask.errors import UsageError

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one per line")
    return keys
