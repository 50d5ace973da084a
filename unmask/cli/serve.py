"""`unmask serve`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from unmask.accounts.provider_settings import IdentityProviderSettings
from unmask.api.settings import KEY_PROBLEM, ServeSettings, is_header_key
from unmask.checkpoint import DEFAULT_MODEL
from unmask.cli.mail import NO_MAIL, MailOptions
from unmask.cli.options import DeviceOption, DtypeOption, amount_option, megabytes_option
from unmask.errors import UsageError

_LIMITS = Group("Limits", sort_key=10)
_REPLICAS = Group("Replicas", sort_key=15)
_ACCOUNTS = Group("Accounts", sort_key=20)
_OIDC = Group("Sign-in with OpenID Connect", sort_key=30)
_INTERNAL = Parameter(parse=False)


def _keys_in_file(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    return _read_keys(tokens[0].value)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServeSettings):
    """`ServeSettings` as options. Here are the fields whose option differs from the field, or that have none.

    Attributes:
        accounts: Require keys of accounts and charge for requests, see "unmask accounts --help".
        warm: Further model to load at the start. Others load with their first request. Repeat it for several.
        api_keys: File with one API key per line. Clients send one as "Authorization: Bearer KEY".
        accounts_url: Database of accounts and catalogue: sqlite:///path or postgresql://user@host/name. Implies
            --accounts. Default: SQLite in UNMASK_HOME.
        free_credit: Dollars that each new account gets once. Default: 0.
        body_limit_bytes: Largest request body, in megabytes.
        cache_bytes: Memory per model for vectors of earlier inputs, in megabytes; 0 turns the cache off.
    """

    models: Annotated[tuple[str, ...], Parameter(name="--model")] = (DEFAULT_MODEL,)
    api_keys: Annotated[
        tuple[str, ...], Parameter(name="--api-key-file", metavar="FILE", n_tokens=1, converter=_keys_in_file)
    ] = ()
    dtype: DtypeOption = "auto"
    device: DeviceOption = "cpu"
    public_url: Annotated[str | None, Parameter(env_var="UNMASK_PUBLIC_URL")] = None
    trusted_proxies: Annotated[tuple[str, ...], Parameter(name="--trusted-proxy")] = ()
    cors_origins: Annotated[tuple[str, ...], Parameter(name="--cors-origin")] = ()
    providers_file: Annotated[Path | None, Parameter(name="--providers", env_var="UNMASK_PROVIDERS")] = None
    playground: Annotated[bool | None, Parameter(negative="--no-playground")] = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    accounts: Annotated[bool, Parameter(group=_ACCOUNTS)] = False
    accounts_url: Annotated[str | None, Parameter(name="--database", group=_ACCOUNTS, env_var="UNMASK_DATABASE")] = None
    free_credit: Annotated[int, Parameter(group=_ACCOUNTS), amount_option(zero=True)] = 0
    flush_charges: Annotated[bool, Parameter(group=_ACCOUNTS)] = False
    limits_url: Annotated[str | None, Parameter(name="--limits", group=_ACCOUNTS, env_var="UNMASK_LIMITS")] = None
    on_redis_failure: Annotated[Literal["share", "refuse"], Parameter(group=_ACCOUNTS)] = "share"
    credit_status: Annotated[Literal[429, 402], Parameter(group=_ACCOUNTS)] = 429

    request_timeout_s: Annotated[float, Parameter(name="--request-timeout", group=_LIMITS)] = 60.0
    stop_delay_s: Annotated[float, Parameter(name="--stop-delay", group=_LIMITS)] = 0.0
    body_limit_bytes: Annotated[int, Parameter(group=_LIMITS), megabytes_option("--body-limit-mb")] = 32_000_000
    queue_tokens: Annotated[int, Parameter(group=_LIMITS)] = 262_144
    cache_bytes: Annotated[int, Parameter(group=_LIMITS), megabytes_option("--cache-mb")] = 64_000_000

    cluster: Annotated[str | None, Parameter(group=_REPLICAS)] = None
    replicas: Annotated[str | None, Parameter(group=_REPLICAS)] = None
    replica_cpus: Annotated[float, Parameter(group=_REPLICAS)] = 1.0
    replica_gpus: Annotated[float, Parameter(group=_REPLICAS)] = 0.0

    catalogue: Annotated[str | None, _INTERNAL] = None
    identity_provider: Annotated[IdentityProviderSettings | None, _INTERNAL] = None
    mail: Annotated[Any, _INTERNAL] = None
    receive_timeout_s: Annotated[float, _INTERNAL] = ServeSettings.receive_timeout_s
    header_timeout_s: Annotated[float, _INTERNAL] = ServeSettings.header_timeout_s
    keep_alive_s: Annotated[float, _INTERNAL] = ServeSettings.keep_alive_s
    max_request_tokens: Annotated[int, _INTERNAL] = ServeSettings.max_request_tokens
    max_request_characters: Annotated[int, _INTERNAL] = ServeSettings.max_request_characters
    shutdown_grace_s: Annotated[float, _INTERNAL] = ServeSettings.shutdown_grace_s

    def __post_init__(self) -> None:
        """Check nothing: `settings` completes the values, and `ServeSettings` checks them."""

    def settings(self, **changes: Any) -> ServeSettings:
        """Return the settings with `changes` and with the values that other options imply.

        Raises:
            UsageError: as `ServeSettings`.
        """
        from unmask.storage.database import default_url

        values = {field.name: getattr(self, field.name) for field in fields(ServeSettings)}
        implied = {
            "warm": (self.models[0], *self.warm),
            "accounts_url": self.accounts_url or (default_url() if self.accounts else None),
            "catalogue": self.accounts_url or default_url(),
        }
        return ServeSettings(**values | implied | changes)


@Parameter(name="*", group=_OIDC)
@dataclass(frozen=True, kw_only=True)
class OidcOptions:
    """An OpenID Connect provider.

    Attributes:
        oidc_issuer: Provider, such as https://login.example.org, whose people may sign in here. Needs the optional
            dependencies oidc.
        oidc_client_id: Id of this server at the provider.
        oidc_client_secret_file: File with the client secret. Default: the variable UNMASK_OIDC_CLIENT_SECRET.
        oidc_name: Name on the sign-in button. Default: the provider's host.
    """

    oidc_issuer: Annotated[str | None, Parameter(env_var="UNMASK_OIDC_ISSUER")] = None
    oidc_client_id: Annotated[str | None, Parameter(env_var="UNMASK_OIDC_CLIENT_ID")] = None
    oidc_client_secret_file: Annotated[str | None, Parameter(env_var="UNMASK_OIDC_CLIENT_SECRET_FILE")] = None
    oidc_name: Annotated[str, Parameter(env_var="UNMASK_OIDC_NAME")] = ""

    def provider(self) -> IdentityProviderSettings | None:
        """Return the provider's settings; None if no provider is named.

        Raises:
            UsageError: there is no issuer but another option, or a value cannot be used.
        """
        if self.oidc_issuer is None:
            if self.oidc_client_id or self.oidc_client_secret_file:
                raise UsageError("--oidc-client-id and --oidc-client-secret-file need --oidc-issuer")
            return None
        secret = os.environ.get("UNMASK_OIDC_CLIENT_SECRET", "")
        if self.oidc_client_secret_file:
            try:
                secret = Path(self.oidc_client_secret_file).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                path = self.oidc_client_secret_file
                raise UsageError(f"--oidc-client-secret-file {path} cannot be read: {error}") from error
        return IdentityProviderSettings(
            issuer=self.oidc_issuer,
            client_id=self.oidc_client_id or "",
            client_secret=secret.strip(),
            name=self.oidc_name,
        )


def serve(
    *, options: ServeOptions = ServeOptions(), oidc: OidcOptions = OidcOptions(), mail: MailOptions = NO_MAIL
) -> int:
    """Serve models behind an OpenAI-compatible API, with pages for people."""
    from unmask.server.hangup import ignore_hangups

    ignore_hangups()
    from unmask.encoder.torch_library import load_torch_library

    load_torch_library()
    from unmask.server import serve as run_server

    return run_server(options.settings(identity_provider=oidc.provider(), mail=mail.server(options.public_url or "")))


def _read_keys(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error}") from error
    numbered = enumerate(map(str.strip, lines), start=1)
    keys = {number: line for number, line in numbered if line and not line.startswith("#")}
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one per line")
    for number, key in keys.items():
        if not is_header_key(key):
            raise UsageError(f"--api-key-file {path}, line {number}: {KEY_PROBLEM}")
    return tuple(keys.values())
