"""Who may call: API keys in the Authorization header, and nowhere else."""

import hashlib
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from unmask.api.errors import ApiError

# What a load balancer must be able to ask without a key.
PUBLIC_PATHS = frozenset({"/health", "/ready"})

_KEY_PARAMETERS = frozenset({"key", "api_key", "apikey", "api-key", "access_token"})


class Gate:
    """Lets a request through, or raises.

    Args:
        api_keys: the keys that open it; with none, it is open.
        public: whether a request needs no key in any case.
    """

    def __init__(self, api_keys: Sequence[str], public: Callable[[Scope], bool] = lambda scope: False) -> None:
        self._public = public
        self._digests = [_digest(key) for key in api_keys]

    def admit(self, scope: Scope) -> str:
        """Who calls: a fingerprint of the key, or the peer's address where no key is needed.

        Raises:
            ApiError: 400 for a key in the URL, 401 for a missing or unknown key.
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
        if not self._digests or scope["path"] in PUBLIC_PATHS or self._public(scope):
            peer = scope.get("client")
            return peer[0] if peer else ""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorised("You didn't provide an API key: send it as 'Authorization: Bearer <key>'.")
        digest = _digest(key)
        # Every key is compared, and digests are of one length, so the time taken tells nothing.
        known = False
        for expected in self._digests:
            known |= hmac.compare_digest(digest, expected)
        if not known:
            raise _unauthorised(f"Incorrect API key provided: {_redacted(key)}.")
        return digest.hex()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _redacted(key: str) -> str:
    return f"{key[:3]}***{key[-2:]}" if len(key) >= 20 else "***"


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
