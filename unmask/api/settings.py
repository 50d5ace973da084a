"""`ServeSettings`: everything that can be set about the HTTP service, checked when it is made."""

import functools
import ipaddress
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

from unmask.accounts.money import MAX_AMOUNT
from unmask.accounts.provider import ProviderSettings, is_this_machine
from unmask.catalogue.mail import MailServer
from unmask.encoder import Dtype
from unmask.errors import UsageError

_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[\w./-]*)?")

LOG_LEVELS = ("debug", "info", "warning", "error")


# Old name -> new name of settings that were renamed; each is read for one release.
_RENAMED = {"limits_without": "on_redis_failure"}

T = TypeVar("T")


def _accept_old_names(settings: type[T]) -> type[T]:
    """Let a dataclass take its settings by their old names as well, with a warning that says the new name."""
    init = settings.__init__

    @functools.wraps(init)
    def init_by_any_name(self: T, **values: Any) -> None:
        for old, new in _RENAMED.items():
            if old in values:
                message = f"the setting {old} is now called {new}; the old name will not be read in the next release"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                values[new] = values.pop(old)
        init(self, **values)

    settings.__init__ = init_by_any_name
    return settings


@_accept_old_names
@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How to serve.

    Attributes:
        host, port: where to listen; port 0 lets the system choose.
        models: ids or paths of the models to serve.
        warm: those of them to load at the start; the others load with their first request.
        api_keys: keys a caller may present. Without any and without accounts, only this machine may be served.
        database: URL of the accounts; None for a server without them.
        catalogue: URL of the database with what the operator added to the catalogue; None for what ships alone.
        free_credit: nano-dollars for whoever signs up.
        flush_charges: on SQLite, whether a request waits until its charge is on the disk, see `Accounts`.
        limits: URL of a Redis that counts requests and tokens per minute for several servers; None for this process.
        on_redis_failure: share or refuse, while it does not answer; see `SharedLimiter`.
        provider: whose people may sign in to an account here; None for passwords alone.
        credit_status: the HTTP status of a request that the credit does not cover: 429 as OpenAI says, or 402.
        body_limit_bytes: largest request body.
        receive_timeout_s: time for a request's body to arrive, counted from its headers.
        header_timeout_s: time for a request's headers to arrive, from the connection or the first byte.
        keep_alive_s: how long an idle connection stays open.
        request_timeout_s: deadline of a request that names none.
        max_request_tokens: tokens of all inputs of a request together.
        max_request_characters: the same before tokenising, which no single call may make take minutes.
        queue_tokens: tokens that may wait in each model's engine.
        dtype, device: precision and place of every model's weights, as for `Encoder.load`.
        cache_bytes: memory of each model for vectors of inputs that were asked for before; 0 for none.
        log_level: debug, info, warning or error.
        shutdown_grace_s: time that accepted requests have left after SIGTERM.
        public_url: where visitors reach this server, for links and examples; left out, what their browsers say.
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-For and -Proto say who calls and how.
        playground: whether visitors may try models on the pages; None for only where no key is needed.
        mail: where mail to those who wanted a model is handed over when it goes live; None for notices on pages alone.

    Raises:
        UsageError: a value is impossible, or the host is open to others and there are neither keys nor accounts.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    models: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    database: str | None = field(default=None, repr=False)
    catalogue: str | None = field(default=None, repr=False)
    free_credit: int = 0
    flush_charges: bool = False
    limits: str | None = field(default=None, repr=False)
    on_redis_failure: str = "share"
    provider: ProviderSettings | None = None
    credit_status: int = 429
    body_limit_bytes: int = 32 * 2**20
    receive_timeout_s: float = 30
    header_timeout_s: float = 10
    keep_alive_s: float = 30
    request_timeout_s: float = 60
    max_request_tokens: int = 300_000
    max_request_characters: int = 8_000_000
    queue_tokens: int = 262_144
    dtype: Dtype = "float32"
    device: str = "cpu"
    cache_bytes: int = 64_000_000
    log_level: str = "info"
    shutdown_grace_s: float = 30
    public_url: str | None = None
    trusted_proxies: tuple[str, ...] = ()
    playground: bool | None = None
    mail: MailServer | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port}: choose 0 to 65535")
        for name, value in vars(self).items():
            counts = isinstance(value, int | float) and not isinstance(value, bool)
            if counts and name not in ("port", "cache_bytes", "free_credit") and value <= 0:
                raise UsageError(f"{name}={value}: must be greater than 0")
        if self.cache_bytes < 0:
            raise UsageError(f"cache_bytes={self.cache_bytes}: must be 0 (no cache) or greater")
        if self.log_level not in LOG_LEVELS:
            raise UsageError(f"log_level={self.log_level!r}: choose one of {', '.join(LOG_LEVELS)}")
        if not all(key.isascii() and key.isprintable() and key and " " not in key for key in self.api_keys):
            raise UsageError("an API key is empty or has characters that no HTTP header can carry")
        if self.public_url is not None and not _ADDRESS.fullmatch(self.public_url):
            raise UsageError(f"public_url={self.public_url!r}: give an address such as https://embed.example.org")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise UsageError(f"trusted proxy {proxy!r}: {error}; write it like 10.0.0.1 or 10.0.0.0/8") from None
        if self.credit_status not in (402, 429):
            raise UsageError(f"credit_status={self.credit_status}: choose 429 or 402")
        if not 0 <= self.free_credit <= MAX_AMOUNT:
            raise UsageError(f"free_credit={self.free_credit}: choose 0 to {MAX_AMOUNT} nano-dollars")
        if self.limits is not None and self.database is None:
            raise UsageError("limits are those of accounts and their keys: turn on accounts as well")
        if self.provider is not None and self.database is None:
            raise UsageError("an OIDC issuer is for signing in to accounts: turn on accounts as well")
        if self.mail is not None and self.database is None:
            raise UsageError("mail goes to accounts that wanted a model: turn on accounts, or name no mail server")
        if self.api_keys and self.database is not None:
            raise UsageError("there are accounts and a key file: use one of them, as accounts have keys of their own")
        if not self.api_keys and self.database is None and not is_this_machine(self.host):
            raise UsageError(
                f"host {self.host!r} can be reached from other machines and no API key is set: "
                "turn on accounts, name a key file, or listen on 127.0.0.1"
            )
