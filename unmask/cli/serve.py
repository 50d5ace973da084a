"""`unmask serve` and the models that it can serve."""

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from unmask.cli.mail import MailFrom, MailUrl, named_server

if TYPE_CHECKING:
    from unmask.accounts.provider import ProviderSettings

_LIMITS = Group("Limits")
_ACCOUNTS = Group("Accounts")


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    model: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    warm: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    api_key_file: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    device: str = "cpu",
    public_url: Annotated[str | None, Parameter(env_var="UNMASK_PUBLIC_URL")] = None,
    trusted_proxy: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    playground: bool | None = None,
    accounts: Annotated[bool, Parameter(group=_ACCOUNTS, negative=())] = False,
    database: Annotated[str | None, Parameter(group=_ACCOUNTS, env_var="UNMASK_DATABASE")] = None,
    free_credit: Annotated[str, Parameter(group=_ACCOUNTS)] = "0",
    flush_charges: Annotated[bool, Parameter(group=_ACCOUNTS, negative=())] = False,
    limits: Annotated[str | None, Parameter(group=_ACCOUNTS, env_var="UNMASK_LIMITS")] = None,
    limits_without: Annotated[Literal["share", "refuse"], Parameter(group=_ACCOUNTS)] = "share",
    oidc_issuer: Annotated[str | None, Parameter(group=_ACCOUNTS, env_var="UNMASK_OIDC_ISSUER")] = None,
    oidc_client_id: Annotated[str | None, Parameter(group=_ACCOUNTS, env_var="UNMASK_OIDC_CLIENT_ID")] = None,
    oidc_client_secret_file: Annotated[
        str | None, Parameter(group=_ACCOUNTS, env_var="UNMASK_OIDC_CLIENT_SECRET_FILE")
    ] = None,
    oidc_name: Annotated[str, Parameter(group=_ACCOUNTS, env_var="UNMASK_OIDC_NAME")] = "",
    credit_status: Annotated[Literal[429, 402], Parameter(group=_ACCOUNTS)] = 429,
    mail_server: MailUrl = None,
    mail_from: MailFrom = "",
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
        Address to listen on. Anything but this machine's own needs --accounts or --api-key-file.
    port
        Port to listen on; 0 lets the system choose.
    model
        Model to serve: a shipped id, a hub id, a folder or a .gguf file. May be repeated.
        The first is loaded at start. Left out: unmask/smollm2-135m-embed.
    warm
        Another model to load at start rather than on first use. May be repeated.
    api_key_file
        File with one API key per line; callers must present one as "Authorization: Bearer KEY".
    dtype
        Precision of the weights. int8 answers almost twice as fast; its vectors have a cosine of about 0.9994 to
        those of float32.
    device
        A torch device, such as cpu or cuda. On a GPU choose bfloat16.
    public_url
        Address under which visitors reach this server, for the links and examples on its pages and in mail.
        Left out: what their browsers say.
    trusted_proxy
        Address or network of a proxy before this server, such as 10.0.0.0/8: only from there X-Forwarded-For and
        X-Forwarded-Proto say who calls, and whether by https. May be repeated.
    playground
        Whether visitors may try models on the pages. Left out: only where no key is needed.
    accounts
        Ask for the keys of accounts, and charge them: see "unmask accounts --help".
    database
        Where the accounts are, and what "unmask catalogue" and "unmask onboard" wrote: sqlite:///path or
        postgresql://user@host/name. Implies --accounts.
        Left out: SQLite in UNMASK_HOME.
    free_credit
        Dollars that everybody who signs up gets once.
    flush_charges
        With SQLite, answer only once the charge is on the disk, which may take milliseconds. Without, a power cut
        may forget the charges of the last moments; killing the server forgets nothing in either case.
    limits
        Where requests and tokens per minute are counted for several servers: redis://host:6379/0.
        Left out: in this process.
    limits_without
        While that does not answer: each server counts its share of every limit, or requests with limits get a 503.
    oidc_issuer
        An OpenID Connect provider, such as https://login.example.org, whose people may sign in to an account here.
        Needs the optional dependencies oidc.
    oidc_client_id
        By which it knows this server.
    oidc_client_secret_file
        File with the secret that goes with it. Left out: what UNMASK_OIDC_CLIENT_SECRET holds.
    oidc_name
        What the button on the sign-in page calls it. Left out: its host.
    credit_status
        HTTP status of a request that the credit does not cover: 429 as OpenAI says, or 402.
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
    from unmask.accounts.money import parse_dollars
    from unmask.api.settings import ServeSettings
    from unmask.checkpoint.resolve import DEFAULT_MODEL
    from unmask.errors import UsageError
    from unmask.server import serve as run_server
    from unmask.storage.database import default_url

    models = model or (DEFAULT_MODEL,)
    try:
        credit = parse_dollars(free_credit)
    except ValueError as error:
        raise UsageError(f"--free-credit: {error}") from None
    return run_server(
        ServeSettings(
            host=host,
            port=port,
            models=models,
            warm=(models[0], *warm),
            api_keys=_read_keys(api_key_file) if api_key_file else (),
            public_url=public_url,
            trusted_proxies=trusted_proxy,
            playground=playground,
            database=database or (default_url() if accounts else None),
            catalogue=database or default_url(),
            mail=named_server(mail_server, mail_from, public_url or ""),
            free_credit=credit,
            provider=_provider(oidc_issuer, oidc_client_id, oidc_client_secret_file, oidc_name),
            credit_status=credit_status,
            flush_charges=flush_charges,
            limits=limits,
            on_redis_failure=limits_without,
            request_timeout_s=request_timeout,
            body_limit_bytes=int(body_limit_mb * 1_000_000),
            queue_tokens=queue_tokens,
            dtype=dtype,
            device=device,
            cache_bytes=int(cache_mb * 1_000_000),
            log_level=log_level,
        )
    )


def _provider(
    issuer: str | None, client_id: str | None, secret_file: str | None, name: str
) -> "ProviderSettings | None":
    import os
    from pathlib import Path

    from unmask.accounts.provider import ProviderSettings
    from unmask.errors import UsageError

    if issuer is None:
        if client_id or secret_file:
            raise UsageError("--oidc-client-id and --oidc-client-secret-file need --oidc-issuer")
        return None
    secret = os.environ.get("UNMASK_OIDC_CLIENT_SECRET", "")
    if secret_file:
        try:
            secret = Path(secret_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--oidc-client-secret-file {secret_file} cannot be read: {error}") from error
    return ProviderSettings(issuer=issuer, client_id=client_id or "", client_secret=secret.strip(), name=name)


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
