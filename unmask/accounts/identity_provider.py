"""Sign-in with an OpenID Connect provider, by the authorization code flow with PKCE.

A visit to the provider is one text, `Visit`, that the visitor's browser keeps. `state`, `nonce` and the PKCE verifier
are digests of it under the pepper. So the server stores nothing, and each server with the same pepper can end the
visit. Without the cookie, nobody can end a visit, or begin one in the name of another visitor.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from unmask.accounts.keys import Peppers
from unmask.accounts.provider_settings import IdentityProviderSettings, is_protected
from unmask.errors import MissingPackages, ProviderUnavailable, SignInRefused
from unmask.storage.database import now_ms

log = logging.getLogger("unmask")

AUTHORIZATION_MS = 10 * 60 * 1000

_SCOPE = "openid email"
# Signatures that only the provider can make. HS256 is signed with the client secret, which others may know, and "none"
# is not signed at all.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_TIMEOUT_S = 10.0
_METADATA_S = 300.0  # how long the discovery document is believed
_LEEWAY_S = 60  # how far the provider's clock may be off
_LONGEST_SUBJECT = 255  # as the standard has it
_LONGEST_NEXT = 500  # the browser keeps it in a cookie


@dataclass(frozen=True)
class Identity:
    """An identity that the provider confirms.

    Attributes:
        issuer, subject: together they identify one person for ever; a mail address does not.
        email: as the provider says, or "".
        verified: the provider's claim `email_verified`; None if it makes none.
    """

    issuer: str
    subject: str
    email: str
    verified: bool | None


@dataclass(frozen=True)
class AuthorizationRequest:
    """A sign-in at the provider that has begun. The browser keeps it in a cookie.

    Attributes:
        until: expiry in Unix milliseconds.
        person: id of the person to link the identity to; "" for signing in.
        next: page to show afterwards.
    """

    until: int
    person: str
    secret: str
    next: str

    @classmethod
    def begin(cls, *, person: str = "", next: str = "") -> "AuthorizationRequest":
        """Begin a request, for signing in or for linking an identity to a person."""
        page = next if len(next) <= _LONGEST_NEXT else ""
        return cls(now_ms() + AUTHORIZATION_MS, person, secrets.token_urlsafe(24), page)

    @classmethod
    def read(cls, text: str) -> "AuthorizationRequest | None":
        """Parse the text that `str` made; None if it is malformed."""
        until, *rest = text.split(".", 3)
        if len(rest) != 3 or not (until.isascii() and until.isdecimal() and len(until) < 19):
            return None
        return cls(int(until), *rest)

    def __str__(self) -> str:
        return f"{self.until}.{self.person}.{self.secret}.{self.next}"


class IdentityProvider:
    """One OpenID Connect provider.

    Args:
        settings: where it is.
        peppers: what `state`, `nonce` and verifiers are made with.

    Raises:
        UsageError: the library for it is not installed.
    """

    def __init__(self, settings: IdentityProviderSettings, peppers: Peppers) -> None:
        try:
            # A missing package shows at the start of the server, and not at the first sign-in.
            import authlib.integrations.httpx_client  # noqa: F401
            import joserfc.jwt  # noqa: F401
        except ImportError as error:
            raise MissingPackages("signing in by OpenID Connect needs", "oidc") from error
        self.settings = settings
        self.name = settings.name
        self._peppers = peppers
        self._metadata: tuple[float, dict[str, Any]] | None = None

    async def address(self, visit: AuthorizationRequest, back: str) -> str:
        """Return the URL of the provider to redirect the browser to.

        Args:
            visit: the request, which the browser keeps.
            back: the redirect URI, our own page that the provider redirects to.

        Raises:
            ProviderUnavailable: it does not answer, or violates the standard.
        """
        with self._provider_errors():
            metadata = await self._discovered()
            async with self._client(metadata, back) as client:
                url, _ = client.create_authorization_url(
                    metadata["authorization_endpoint"],
                    state=self._derived("state", visit),
                    nonce=self._derived("nonce", visit),
                    code_verifier=self._derived("verifier", visit),
                )
        return url

    async def identity(self, visit: AuthorizationRequest | None, callback: Mapping[str, str], back: str) -> Identity:
        """Exchange the authorization code, and return the identity of the visitor.

        Args:
            visit: the request that the browser kept.
            callback: parameters of the redirect: `code` and `state`, or `error`.
            back: the redirect URI, as for `address`.

        Raises:
            SignInRefused: the request is of another browser or too old, or the provider confirms no identity.
            ProviderUnavailable: it does not answer, or violates the standard.
        """
        again = f"begin again at 'Sign in with {self.name}'"
        if visit is None or not hmac.compare_digest(
            self._derived("state", visit).encode(), callback.get("state", "").encode()
        ):
            raise SignInRefused(f"this way back from {self.name} was not begun in this browser: {again}")
        if visit.until < now_ms():
            raise SignInRefused(f"the way to {self.name} and back took longer than ten minutes: {again}")
        if not callback.get("code"):
            # Its own words are not repeated: whoever makes up such an address could say anything with them.
            raise SignInRefused(f"you were not signed in by {self.name}: {again}")
        with self._provider_errors():
            metadata = await self._discovered()
            async with self._client(metadata, back) as client:
                keys = await self._json(client, metadata["jwks_uri"])  # first, as a code can be used only once
                token = await client.fetch_token(
                    metadata["token_endpoint"],
                    grant_type="authorization_code",
                    code=callback["code"],
                    code_verifier=self._derived("verifier", visit),
                )
                claims = self._claims(token["id_token"], keys, self._derived("nonce", visit))
                if not claims.get("email") and metadata.get("userinfo_endpoint"):
                    claims = await self._completed(client, metadata["userinfo_endpoint"], claims)
        email, verified = claims.get("email"), claims.get("email_verified")
        return Identity(
            self.settings.issuer,
            claims["sub"],
            email if isinstance(email, str) else "",
            # Some providers send it as a text.
            None if verified is None else verified is True or verified == "true",
        )

    def _claims(self, id_token: str, keys: dict[str, Any], nonce: str) -> dict[str, Any]:
        """Return the claims of an ID token. Checks its signature and every claim that the standard requires."""
        from joserfc import jwt
        from joserfc.errors import InvalidClaimError
        from joserfc.jwk import KeySet

        claims = jwt.decode(id_token, KeySet.import_key_set(keys), algorithms=_ALGORITHMS).claims  # pyright: ignore
        ours = self.settings.client_id
        jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": self.settings.issuer},
            sub={"essential": True},
            aud={"essential": True, "value": ours},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": nonce},
        ).validate(claims)
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if claims.get("azp", None if several else ours) != ours:
            raise InvalidClaimError("azp")
        if not isinstance(claims["sub"], str) or len(claims["sub"]) > _LONGEST_SUBJECT:
            raise InvalidClaimError("sub")
        return claims

    async def _completed(self, client: Any, url: str, claims: dict[str, Any]) -> dict[str, Any]:
        """Add the mail address from the user info endpoint, for providers that leave it out of their tokens."""
        answer = await client.get(url)
        answer.raise_for_status()
        info = answer.json()
        if info["sub"] != claims["sub"]:
            raise ValueError("the user info is somebody else's")
        return claims | {name: info[name] for name in ("email", "email_verified") if name in info}

    async def _discovered(self) -> dict[str, Any]:
        """Return the provider's discovery document, cached for some minutes."""
        if self._metadata is not None and time.monotonic() - self._metadata[0] < _METADATA_S:
            return self._metadata[1]
        url = f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration"
        async with self._client({}, "") as client:
            document = await self._json(client, url)
        if document["issuer"] != self.settings.issuer:
            raise ValueError(f"it says that its issuer is {str(document['issuer'])[:200]!r}")
        for endpoint in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            if not is_protected(document[endpoint]):
                raise ValueError(f"its {endpoint} is no https address")
        self._metadata = time.monotonic(), document
        return document

    async def _json(self, client: Any, url: str) -> dict[str, Any]:
        answer = await client.request("GET", url, withhold_token=True)
        answer.raise_for_status()
        content = answer.json()
        if not isinstance(content, dict):
            raise ValueError(f"{url} holds no JSON object")
        return content

    def _client(self, metadata: Mapping[str, Any], back: str) -> Any:
        from authlib.integrations.httpx_client import AsyncOAuth2Client

        methods = metadata.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        return AsyncOAuth2Client(
            self.settings.client_id,
            self.settings.client_secret,
            token_endpoint_auth_method="client_secret_basic" if "client_secret_basic" in methods else methods[0],
            scope=_SCOPE,
            redirect_uri=back,
            code_challenge_method="S256",
            timeout=_TIMEOUT_S,
        )

    def _derived(self, what: str, visit: AuthorizationRequest) -> str:
        return self._peppers.permanent_digest(f"oidc {what} {visit}")

    @contextmanager
    def _provider_errors(self) -> Iterator[None]:
        """Translate errors of the exchange into messages for the visitor, and log them for the operator."""
        from authlib.common.errors import AuthlibBaseError
        from httpx2 import HTTPError, HTTPStatusError, InvalidURL
        from joserfc.errors import JoseError

        unavailable = ProviderUnavailable(f"just now {self.name} cannot be asked who you are: try again in a moment")
        refused = SignInRefused(f"what {self.name} says of you cannot be believed: begin again, or sign up here")
        try:
            yield
        except HTTPStatusError as error:
            log.warning("OIDC: %s answered with %d", error.request.url, error.response.status_code)
            raise unavailable from error
        except AuthlibBaseError as error:
            log.warning("OIDC: %s did not take the code: %s", self.settings.issuer, str(error.error)[:40])
            # invalid_grant: the visitor's code was used before, has expired or belongs to another client. Any other
            # error means that the provider does not accept this server as a client.
            raise (refused if error.error == "invalid_grant" else unavailable) from error
        except JoseError as error:
            log.warning("OIDC: the ID token of %s was refused: %s", self.settings.issuer, error)
            raise refused from error
        except (HTTPError, InvalidURL, LookupError, TypeError, ValueError) as error:
            log.warning("OIDC: %s cannot be asked: %s: %s", self.settings.issuer, type(error).__name__, error)
            raise unavailable from error
