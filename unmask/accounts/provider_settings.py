"""Settings of an OpenID Connect provider. This module imports no database, for the command line."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from unmask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class IdentityProviderSettings:
    """Settings of an OpenID Connect provider.

    Attributes:
        issuer: the provider's URL, exactly as it signs it.
        client_id, client_secret: by which it knows this server.
        name: what people call it; left out, its host.

    Raises:
        UsageError: the issuer is no https URL, or an id or secret is missing.
    """

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        if not is_protected(self.issuer) or any(mark in self.issuer for mark in "?#"):
            raise UsageError(
                f"the OIDC issuer {self.issuer!r} cannot be used: give its https address, such as "
                "https://login.example.org"
            )
        if not self.client_id or not self.client_secret:
            raise UsageError(
                f"the OIDC issuer {self.issuer} needs a client id (--oidc-client-id) and a client secret "
                "(--oidc-client-secret-file, or UNMASK_OIDC_CLIENT_SECRET)"
            )
        if not self.name:
            object.__setattr__(self, "name", urlsplit(self.issuer).hostname)


def is_protected(url: object) -> bool:
    """True if the connection to a URL is protected: https, or this machine."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.username is not None:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_this_machine(host)))


def is_this_machine(host: str) -> bool:
    """True if a host is this machine's own address, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
