"""Who may call: API keys in the Authorization header, and nowhere else."""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from unmask.accounts import Accounts, Caller
from unmask.api.errors import ApiError
from unmask.errors import KeyRefused

# What a load balancer must be able to ask without a key.
PUBLIC_PATHS = frozenset({"/health", "/ready"})

_KEY_PARAMETERS = frozenset({"key", "api_key", "apikey", "api-key", "access_token"})


@dataclass(frozen=True)
class Admitted:
    """Somebody who was let through.

    Attributes:
        share: whose fair share of an engine the work takes: an account's, a key's or an address's.
        caller: the account and key, where there are accounts and the path asks for a key.
    """

    share: str
    caller: Caller | None = None


class Gate:
    """Lets a request through, or raises.

    Args:
        api_keys: the keys that open it; with none, and without accounts, it is open.
        accounts: whose keys open it.
        public: whether a request needs no key in any case.
    """

    def __init__(
        self,
        api_keys: Sequence[str],
        accounts: Accounts | None = None,
        public: Callable[[Scope], bool] = lambda scope: False,
    ) -> None:
        self._public = public
        self._digests = [_digest(key) for key in api_keys]
        self._accounts = accounts

    async def admit(self, scope: Scope) -> Admitted:
        """Who calls.

        Raises:
            ApiError: 400 for a key in the URL, 401 for a missing or unknown key.
            Forbidden: the account is frozen, or the key may not come from here.
            StorageError: the accounts cannot be reached.
        """
        in_url = _KEY_PARAMETERS.intersection(QueryParams(scope.get("query_string", b"")))
        if in_url:
            raise ApiError(
                400,
                f"'{min(in_url)}' in the URL is refused, because URLs end up in logs: "
                "send the key as 'Authorization: Bearer <key>', and replace it if it was a real one.",
                param=min(in_url),
                code="key_in_url",
            )
        peer = scope.get("client")
        address = peer[0] if peer else ""
        keyless = scope["path"] in PUBLIC_PATHS or self._public(scope)
        if keyless or not (self._digests or self._accounts):
            return Admitted(address)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorised("You didn't provide an API key: send it as 'Authorization: Bearer <key>'.")
        if self._accounts is not None:
            try:
                caller = await self._accounts.authenticate(key, address)
            except KeyRefused as refused:
                raise _unauthorised(f"Incorrect API key provided: {_redacted(key)}: {refused}.") from None
            return Admitted(caller.account_id, caller)
        digest = _digest(key)
        # Every key is compared, and digests are of one length, so the time taken tells nothing.
        known = False
        for expected in self._digests:
            known |= hmac.compare_digest(digest, expected)
        if not known:
            raise _unauthorised(f"Incorrect API key provided: {_redacted(key)}.")
        return Admitted(digest.hex()[:16])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _redacted(key: str) -> str:
    return f"{key[:3]}***{key[-2:]}" if len(key) >= 20 else "***"


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
