"""The file of providers: who answers for which model, where, and under which conditions."""

import os
import re
import stat
import tomllib
from collections import Counter
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from unmask.accounts.money import parse_dollars
from unmask.conformance import PrecisionClass, read_references
from unmask.conformance.references import PRECISION_CLASSES
from unmask.encoder import Dtype
from unmask.errors import CheckpointError, UsageError
from unmask.router import hedging, retry_budget
from unmask.router.addresses import check_url
from unmask.validation import validation_message

Kind = Literal["unmask", "openai", "tei"]
DataPolicy = Literal["none", "30d", "trains"]

# Dearest price per million tokens, in nano-dollars: a thousand dollars, above which it is a mistake.
_MAX_COST = 10**12

# Most texts of one request that a kind takes by default.
_MAX_INPUTS: dict[Kind, int] = {"unmask": 2048, "openai": 1024, "tei": 32}


class CostPrice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Price of a provider from a day on.

    Attributes:
        since: first day, in UTC.
        usd: dollars per million tokens.
    """

    since: date = msgspec.field(name="from")
    usd: str


class ProviderModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that a provider serves.

    Attributes:
        id: id of the model here.
        remote: the provider's name for it; "" for the same id.
        precision: least exact precision that its vectors may have; the canaries decide what they have.
        cost: dollars per million tokens, or such prices with the day from which each counts.
        max_inputs: most texts of one request; None for the usual number of the kind.
        max_tokens: longest text; None for the model's own maximum.
        priority: 0 first; a group is asked only when nobody of the one before is left.
        allow_loss: it may answer requests that earn less than it costs.
        reads_control_tokens: it takes `</s>` and the like in a user's text for control tokens, as llama.cpp does. Texts
            with anything of that form are not sent to it, and neither are such canaries.
        hedge: slow requests may be sent to it and to another such provider at the same time.
    """

    id: Annotated[str, Meta(min_length=1)]
    remote: str = ""
    precision: Dtype = "float16"
    cost: str | tuple[CostPrice, ...] = "0"
    max_inputs: Annotated[int, Meta(ge=1, le=2048)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    priority: Annotated[int, Meta(ge=0, le=99)] = 0
    allow_loss: bool = False
    reads_control_tokens: bool = False
    hedge: bool = False

    @property
    def name_there(self) -> str:
        """The name under which the provider knows the model."""
        return self.remote or self.id

    @property
    def precision_class(self) -> PrecisionClass:
        """The precision in conformance's words."""
        return PRECISION_CLASSES[self.precision]

    def cost_on(self, day: date) -> int:
        """Return the nano-dollars per million tokens on a day."""
        return _cost_on(self.cost, day)


class RemoteProvider(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process or service elsewhere that answers for models.

    Attributes:
        name: unique; shown to callers.
        kind: its API: "unmask", "openai" (OpenAI, vLLM, llama.cpp, LiteLLM and others) or "tei".
        url: its base URL, up to and without `/embeddings` or `/embed`.
        private: it is inside this network: http and addresses that are not global are allowed.
        key_env: environment variable with its API key.
        key_file: file with its API key, readable by the owner alone.
        ca_file: certificate authority that signed its certificate; None for the system's.
        client_cert_file, client_key_file: certificate that this server shows to it, and its private key, readable by
            the owner alone; None for none.
        proxy: URL of a proxy inside this network through which it is reached; None for none. Proxies of the environment
            are never used.
        max_parallel: most requests at the same time.
        max_cost_per_day: dollars after which it gets no request until midnight, UTC; None for no limit.
        data: whether it keeps texts: not at all, for 30 days, or to train with.
        country: ISO code of the country where texts go; "" for not known.
        models: the models.
    """

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
    kind: Kind
    url: str
    private: bool = False
    key_env: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    proxy: str | None = None
    max_parallel: Annotated[int, Meta(ge=1, le=1000)] = 16
    max_cost_per_day: str | None = None
    data: DataPolicy = "none"
    country: Annotated[str, Meta(pattern=r"^([A-Z]{2})?$")] = ""
    models: Annotated[tuple[ProviderModel, ...], Meta(min_length=1)] = msgspec.field(name="model")

    def inputs_per_request(self, model: ProviderModel) -> int:
        """Return the most texts of one request."""
        return model.max_inputs or _MAX_INPUTS[self.kind]

    @property
    def max_daily_cost(self) -> int | None:
        """`max_cost_per_day` in nano-dollars."""
        return None if self.max_cost_per_day is None else parse_dollars(self.max_cost_per_day)

    @property
    def takes_instructions(self) -> bool:
        """True if requests can carry an instruction that is not pooled."""
        return self.kind == "unmask"

    def read_key(self) -> str:
        """Return the API key, "" for none.

        Raises:
            UsageError: the variable is not set, or the file cannot be read or is open to others.
        """
        if self.key_env is not None:
            key = os.environ.get(self.key_env, "").strip()
            if not key:
                raise UsageError(f"the environment variable {self.key_env}, which key_env names, is not set")
        elif self.key_file is not None:
            file = Path(self.key_file).expanduser()
            try:
                if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise UsageError(f"key_file {file} is open to other users: chmod 600 {file}")
                key = file.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"key_file {file} cannot be read: {error}") from None
        else:
            return ""
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise UsageError(
                f"the key of {self.key_env or self.key_file} is empty or has blanks, or letters beyond ASCII"
            )
        return key


class Providers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        remote_only: ids of models that this server never loads: providers alone answer for them.
        references: id of such a model -> file of its right vectors, made where the weights are. Without one, they are
            computed here.
        min_margin: share of a request's price that must remain after the provider's cost; see `allow_loss`. Above 0, a
            request that is repeated under its Idempotency-Key has no price to cover a cost.
        readmit: "auto" ends a quarantine that canaries ordered once two full runs in a row have passed; "operator"
            leaves it to a person.
        cross_check: share of the answered requests after which a text of our own is asked of the provider and of
            others, or of this server's engine, to see that they agree. 0 for none.
        retry_tokens: share of a model's tokens that repeated requests may cost, beside a reserve for quiet times.
        hedge_tokens: share of a model's tokens that hedges may cost, within the budget for repeated requests.
        canary_every_s: seconds between two light runs of an endpoint with traffic; None for a minute. A provider that
            drifts answers wrongly for up to this long.
    """

    remote_only: tuple[str, ...] = ()
    references: dict[str, str] = {}
    min_margin: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    readmit: Literal["operator", "auto"] = "operator"
    cross_check: Annotated[float, Meta(ge=0, le=1)] = 0.0
    retry_tokens: Annotated[float, Meta(ge=0, le=1)] = retry_budget.SHARE
    hedge_tokens: Annotated[float, Meta(ge=0, le=1)] = hedging.SHARE
    canary_every_s: Annotated[float, Meta(ge=10, le=3600)] | None = None
    providers: tuple[RemoteProvider, ...] = msgspec.field(name="provider", default=())

    def of_model(self, model: str) -> list[tuple[RemoteProvider, ProviderModel]]:
        """Return the providers of a model, in the order of the file."""
        return [(provider, entry) for provider in self.providers for entry in provider.models if entry.id == model]

    def references_file(self, model: str) -> Path | None:
        """Return the file of a model's right vectors; None for one that are computed here."""
        return Path(self.references[model]).expanduser() if model in self.references else None

    def keys(self) -> tuple[str, ...]:
        """Return all API keys, to be redacted wherever they appear."""
        return tuple(filter(None, (provider.read_key() for provider in self.providers)))


def read_providers(file: Path) -> Providers:
    """Read and check a file of providers.

    Raises:
        UsageError: it cannot be read, or a value is wrong; the message names the file and the key.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    try:
        parsed = msgspec.convert(content, Providers)
    except msgspec.ValidationError as error:
        reason, _, path = validation_message(error, Providers).partition(" - at `$.")
        names = [entry.get("name") for entry in content.get("provider", []) if isinstance(entry, dict)]
        raise UsageError(f"{file}: {_with_name(path.rstrip('`'), names)}: {reason[0].lower()}{reason[1:]}") from None
    for index, provider in enumerate(parsed.providers):
        for key, problem in _problems(provider):
            raise UsageError(f"{file}: provider[{index}].{key} ({provider.name}): {problem}")
    ids = {model.id for provider in parsed.providers for model in provider.models}
    for index, id in enumerate(parsed.remote_only):
        if id not in ids:
            raise UsageError(f"{file}: remote_only[{index}]: {id} has no provider, so nobody would answer for it")
    for id in parsed.references:
        if problem := _references_problem(parsed, id):
            raise UsageError(f'{file}: references."{id}": {problem}')
    twice = [name for name, count in Counter(provider.name for provider in parsed.providers).items() if count > 1]
    if twice:
        raise UsageError(f"{file}: provider.name: two providers are called {twice[0]!r}")
    return parsed


@lru_cache(1024)
def _cost_on(cost: str | tuple[CostPrice, ...], day: date) -> int:
    """Return the nano-dollars per million tokens on a day. Asked for at every request, so it is remembered."""
    if isinstance(cost, str):
        return parse_dollars(cost)
    in_force = [price for price in cost if price.since <= day]
    return parse_dollars(max(in_force, key=lambda price: price.since).usd) if in_force else 0


def _problems(provider: RemoteProvider) -> list[tuple[str, str]]:
    """Return what the types cannot check, as (key, problem)."""
    problems = []
    try:
        check_url(provider.url, private=provider.private)
    except UsageError as error:
        problems.append(("url", str(error)))
    if provider.key_env is not None and provider.key_file is not None:
        problems.append(("key_env", "there is key_file as well: use one of them"))
    else:
        try:
            provider.read_key()
        except UsageError as error:
            problems.append(("key_env" if provider.key_env is not None else "key_file", str(error)))
    problems += _tls_problems(provider)
    if provider.proxy is not None:
        try:
            check_url(provider.proxy, private=True)
        except UsageError as error:
            problems.append(("proxy", str(error)))
    if provider.max_cost_per_day is not None:
        try:
            parse_dollars(provider.max_cost_per_day)
        except ValueError as error:
            problems.append(("max_cost_per_day", str(error)))
    ids = [model.id for model in provider.models]
    for index, model in enumerate(provider.models):
        if ids.index(model.id) != index:
            problems.append((f"model[{index}].id", f"{model.id} is named twice"))
        for price in (model.cost,) if isinstance(model.cost, str) else tuple(entry.usd for entry in model.cost):
            try:
                if parse_dollars(price) > _MAX_COST:
                    raise ValueError(f"{price} is more than 1000 dollars per million tokens")
            except ValueError as error:
                problems.append((f"model[{index}].cost", str(error)))
    return problems


def _references_problem(providers: Providers, model: str) -> str:
    """Return why the file of a model's right vectors cannot be used; "" if it can."""
    if model not in providers.remote_only:
        return "the model is not in remote_only, so its right vectors are computed here from its weights"
    file = providers.references_file(model)
    assert file is not None
    try:
        if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return f"{file} is open to other users, who could answer its unpublished texts: chmod 600 {file}"
        named = read_references(file).model
    except (OSError, CheckpointError) as error:
        return str(error)
    return "" if named == model else f"{file} is for {named}"


def _tls_problems(provider: RemoteProvider) -> list[tuple[str, str]]:
    """Return missing or open files of certificates, as (key, problem)."""
    problems = []
    files = {name: getattr(provider, name) for name in ("ca_file", "client_cert_file", "client_key_file")}
    for name, file in files.items():
        if file is not None and not Path(file).expanduser().is_file():
            problems.append((name, f"there is no file {file}"))
    if (provider.client_cert_file is None) != (provider.client_key_file is None):
        missing = "client_key_file" if provider.client_key_file is None else "client_cert_file"
        problems.append((missing, "a certificate needs its key, and a key its certificate: name both files"))
    elif provider.client_key_file is not None and not problems:
        key = Path(provider.client_key_file).expanduser()
        if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            problems.append(("client_key_file", f"{key} is open to other users: chmod 600 {key}"))
    return problems


def _with_name(path: str, names: list[str | None]) -> str:
    """Add the provider's name to a path such as `provider[1].url`."""
    match = re.match(r"provider\[(\d+)\]", path)
    if match is None:
        return path or "the file"
    index = int(match[1])
    name = names[index] if index < len(names) else None
    return f"{path} ({name})" if name else path
