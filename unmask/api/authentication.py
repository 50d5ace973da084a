"""Authenticate requests by API keys in the header Authorization, or api-key as Azure's clients send it."""

import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from unmask.accounts import Accounts
from unmask.accounts.limits import caller_network
from unmask.api.context import Principal
from unmask.api.errors import ApiError
from unmask.errors import KeyRefused

# Paths that a load balancer must be able to ask for without a key.
PUBLIC_PATHS = frozenset({"/health", "/ready"})

_KEY_PARAMETERS = frozenset({"key", "api_key", "apikey", "api-key", "access_token"})


class Authenticator:
    """Find the principal of a request, or refuse the request.

    Args:
        api_keys: accepted keys. With none of them and without accounts, every request is accepted.
        accounts: the accounts whose keys are accepted.
        is_public: tells for a scope that its path needs no key.
    """

    def __init__(
        self,
        api_keys: Sequence[str],
        accounts: Accounts | None = None,
        is_public: Callable[[Scope], bool] = lambda scope: False,
    ) -> None:
        self._is_public = is_public
        self._digests = [_digest(key) for key in api_keys]
        self._accounts = accounts

    async def authenticate(self, scope: Scope) -> Principal:
        """Return the principal of a request.

        Raises:
            ApiError: 400 for a key in the URL, 401 for a missing or unknown key.
            Forbidden: the account is frozen, or the key may not come from this address.
            StorageError: the accounts cannot be reached.
        """
        _refuse_key_in_url(scope)
        peer = scope.get("client")
        address = peer[0] if peer else ""
        needs_no_key = scope["path"] in PUBLIC_PATHS or self._is_public(scope)
        if needs_no_key or not (self._digests or self._accounts):
            return Principal(caller_network(address))
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        if "authorization" not in headers and "api-key" in headers:  # Azure's clients
            scheme, key = "bearer", headers["api-key"].strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorised("You didn't provide an API key: send it as 'Authorization: Bearer <key>'.")
        if self._accounts is not None:
            try:
                caller = await self._accounts.authenticate(key, address)
            except KeyRefused as refusal:
                raise _unauthorised(f"Incorrect API key provided: {_redacted(key)}: {refusal}.") from None
            return Principal(caller.account_id, caller)
        digest = _digest(key)
        # Compares every key, by digests of one length, so that the time taken reveals nothing.
        accepted = False
        for expected in self._digests:
            accepted |= hmac.compare_digest(digest, expected)
        if not accepted:
            raise _unauthorised(f"Incorrect API key provided: {_redacted(key)}.")
        return Principal(digest.hex()[:16])


def _refuse_key_in_url(scope: Scope) -> None:
    query = scope.get("query_string", b"")
    names = _KEY_PARAMETERS.intersection(QueryParams(query)) if query else ()
    if names:
        raise ApiError(
            400,
            f"'{min(names)}' in the URL is refused, because URLs end up in logs: "
            "send the key as 'Authorization: Bearer <key>', and replace it if it was a real one.",
            param=min(names),
            code="key_in_url",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _redacted(key: str) -> str:
    return f"{key[:3]}***{key[-2:]}" if len(key) >= 20 else "***"


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
