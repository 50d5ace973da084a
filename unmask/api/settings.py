"""`ServeSettings`: everything that can be set about the HTTP service, checked when it is made."""

import ipaddress
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from unmask.accounts.money import MAX_AMOUNT
from unmask.accounts.provider_settings import IdentityProviderSettings, is_this_machine
from unmask.catalogue.mail_server import MailServer
from unmask.cluster.options import ReplicaOptions
from unmask.encoder import DtypeChoice
from unmask.errors import UsageError

_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(/[\w./-]*)?")

# An origin as browsers send it.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_DEFAULT_PORT = re.compile(r"(http://.*:80|https://.*:443)")

_MAY_BE_ZERO = ("port", "cache_bytes", "free_credit", "replica_gpus", "stop_delay_s")
LOG_LEVELS = ("debug", "info", "warning", "error")
KEY_PROBLEM = "an API key is empty or has characters that no HTTP header can carry"


def is_header_key(key: str) -> bool:
    """True for a key that an HTTP header can carry."""
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server. Most fields are options of `unmask serve`.

    Attributes:
        host: Address to listen on. Other addresses than this machine's own need accounts or API keys.
        port: Port to listen on; 0 lets the system choose one.
        models: Shipped id, hub id, folder or .gguf file of a model to serve. Repeat it for several. On SIGHUP files
            with another revision take the place of those that answer.
        warm: models to load at the start; the others load with their first request.
        api_keys: keys that a client may present.
        accounts_url: URL of the database of accounts; None for a server without accounts.
        catalogue: URL of the database with the operator's records; None for the shipped records alone.
        free_credit: nano-dollars that each new account gets once.
        flush_charges: With SQLite, respond only when the charge is on disk, which may take milliseconds. Without it,
            a power cut may lose the charges of the last moments. A killed server loses nothing in either case.
        limits_url: Redis that counts requests and tokens per minute for several servers: redis://host:6379/0. Default:
            each server counts for itself.
        on_redis_failure: While Redis does not respond, "share" lets each server apply its share of every limit, and
            "refuse" answers requests that have limits with 503.
        identity_provider: OpenID Connect provider for signing in; None for passwords alone.
        credit_status: HTTP status of a request that the credit does not cover: 429 as OpenAI says, or 402.
        body_limit_bytes: largest request body.
        receive_timeout_s: seconds for the body of a request to arrive, counted from its headers.
        header_timeout_s: seconds for the headers of a request to arrive, from the connection or the first byte.
        keep_alive_s: seconds that an idle connection stays open.
        request_timeout_s: Seconds that a request may take if its client names no deadline.
        max_request_tokens: most tokens of all inputs of a request.
        max_request_characters: most characters of a request, checked before tokenising, so that no call takes minutes.
        queue_tokens: Tokens that may wait per model. More requests are refused with 429.
        dtype: precision of the weights, as for `Encoder.load`.
        device: torch device, as for `Encoder.load`.
        cache_bytes: memory of each model for vectors of earlier inputs; 0 turns the cache off.
        cluster: Compute in replicas on a Ray cluster: auto (RAY_ADDRESS, or the cluster of this machine), HOST:PORT of
            its head, or local, which starts one here. Needs the optional dependencies ray, and --replicas.
        replicas: Number of replicas of each loaded model: processes that compute, while this one keeps queue, keys and
            money. LEAST:MOST, as in 2:16, starts more while many tokens wait.
        replica_cpus: Processors of a replica.
        replica_gpus: GPUs of a replica. Its model needs the device cuda.
        log_level: Least level of messages to log on stderr.
        stop_delay_s: Seconds that the server goes on answering after SIGTERM, while /ready says that it stops. A load
            balancer that notices within them loses no request.
        shutdown_grace_s: seconds that accepted requests have left after SIGTERM and the delay.
        public_url: Address of this server for links and examples on its pages and in mail. Default: the address that
            the browser asks for.
        trusted_proxies: Address or network of a proxy, such as 10.0.0.0/8. Only its X-Forwarded-For and
            X-Forwarded-Proto are believed. Repeat it for several.
        cors_origins: Origin whose pages may call the API from a browser, such as https://app.example.org. Cookies are
            never accepted from there. Repeat it for several.
        providers_file: File of providers that answer for models elsewhere, see the how-to guide. Read again on SIGHUP.
        hide_providers: Give callers letters for the names of providers, and neither their countries, kinds nor costs.
        playground: Let visitors try models on the pages. Default: only where no key is needed.
        mail: mail server for notices to people who voted for a model; None for notices on the pages alone.

    Raises:
        UsageError: a value is impossible, or the host is open to others and there are neither keys nor accounts.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    models: tuple[str, ...] = ()
    warm: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    accounts_url: str | None = field(default=None, repr=False)
    catalogue: str | None = field(default=None, repr=False)
    free_credit: int = 0
    flush_charges: bool = False
    limits_url: str | None = field(default=None, repr=False)
    on_redis_failure: str = "share"
    identity_provider: IdentityProviderSettings | None = None
    credit_status: int = 429
    body_limit_bytes: int = 32 * 2**20
    receive_timeout_s: float = 30
    header_timeout_s: float = 10
    keep_alive_s: float = 30
    request_timeout_s: float = 60
    max_request_tokens: int = 300_000
    max_request_characters: int = 8_000_000
    queue_tokens: int = 262_144
    dtype: DtypeChoice = "auto"
    device: str = "cpu"
    cache_bytes: int = 64_000_000
    cluster: str | None = None
    replicas: str | None = None
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    log_level: str = "info"
    stop_delay_s: float = 0
    shutdown_grace_s: float = 30
    public_url: str | None = None
    trusted_proxies: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    providers_file: Path | None = None
    hide_providers: bool = False
    playground: bool | None = None
    mail: MailServer | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port}: choose 0 to 65535")
        for name, value in vars(self).items():
            counts = isinstance(value, int | float) and not isinstance(value, bool)
            if counts and name not in _MAY_BE_ZERO and not 0 < value < math.inf:
                raise UsageError(f"{name}={value}: must be greater than 0, and finite")
        if not 0 <= self.cache_bytes < math.inf:
            raise UsageError(f"cache_bytes={self.cache_bytes}: must be 0 (no cache) or greater")
        if not 0 <= self.stop_delay_s < math.inf:
            raise UsageError(f"stop_delay_s={self.stop_delay_s}: must be 0 or greater, and finite")
        self._check_replicas()
        if self.log_level not in LOG_LEVELS:
            raise UsageError(f"log_level={self.log_level!r}: choose one of {', '.join(LOG_LEVELS)}")
        if not all(map(is_header_key, self.api_keys)):
            raise UsageError(KEY_PROBLEM)
        if self.public_url is not None and not _ADDRESS.fullmatch(self.public_url):
            raise UsageError(f"public_url={self.public_url!r}: give an address such as https://embed.example.org")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise UsageError(f"trusted proxy {proxy!r}: {error}; write it like 10.0.0.1 or 10.0.0.0/8") from None
        for origin in self.cors_origins:
            _check_origin(origin)
        if self.credit_status not in (402, 429):
            raise UsageError(f"credit_status={self.credit_status}: choose 429 or 402")
        if not 0 <= self.free_credit <= MAX_AMOUNT:
            raise UsageError(f"free_credit={self.free_credit}: choose 0 to {MAX_AMOUNT} nano-dollars")
        if self.limits_url is not None and self.accounts_url is None:
            raise UsageError("limits are those of accounts and their keys: turn on accounts as well")
        if self.identity_provider is not None and self.accounts_url is None:
            raise UsageError("an OIDC issuer is for signing in to accounts: turn on accounts as well")
        if self.mail is not None and self.accounts_url is None:
            raise UsageError("mail goes to accounts that voted for a model: turn on accounts, or name no mail server")
        if self.api_keys and self.accounts_url is not None:
            raise UsageError("there are accounts and a key file: use one of them, as accounts have keys of their own")
        if not self.api_keys and self.accounts_url is None and not is_this_machine(self.host):
            raise UsageError(
                f"host {self.host!r} can be reached from other machines and no API key is set: "
                "turn on accounts, name a key file, or listen on 127.0.0.1"
            )

    def _check_replicas(self) -> None:
        if not 0 <= self.replica_gpus < math.inf:
            raise UsageError(f"replica_gpus={self.replica_gpus}: must be 0 or greater, and finite")
        if (options := self.replica_options()) is not None:
            options.limits()
        if self.replicas is not None and self.cluster is None:
            raise UsageError(f"replicas={self.replicas!r}: name their cluster too, such as --cluster local")
        if self.cluster is not None and self.replicas is None:
            raise UsageError(f"cluster={self.cluster!r}: say how many replicas, such as --replicas 2")

    def replica_options(self) -> ReplicaOptions | None:
        """Return number and size of the replicas; None for a server that computes itself."""
        if self.replicas is None:
            return None
        return ReplicaOptions(replicas=self.replicas, replica_cpus=self.replica_cpus, replica_gpus=self.replica_gpus)


def _check_origin(origin: str) -> None:
    """Check that an origin is written as browsers send it.

    Raises:
        UsageError: it is not.
    """
    if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
        raise UsageError(
            f"CORS origin {origin!r}: write it as browsers send it, such as https://app.example.org or "
            "http://localhost:3000, in small letters, without a path, a slash at the end or the default port"
        )
