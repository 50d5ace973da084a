"""Addresses that an outbound connection may go to. Checked as connected, not as spelled."""

import ipaddress
import re
from urllib.parse import urlsplit

from unmask.errors import UsageError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(text: str) -> tuple[_Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in text.split())


# Networks that are not globally reachable, by IANA's special-purpose registries. Our own table: `is_global` of
# CPython before 3.11.10 and 3.12.4 is wrong about several of them (CVE-2024-4032).
_NOT_GLOBAL = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
    "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    "::/128 ::1/128 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16 fc00::/7 "
    "fe80::/10 fec0::/10 ff00::/8"
)

# Never, for private providers neither: this host as a whole, link-local and cloud metadata, multicast, broadcast.
_FORBIDDEN = _networks(
    "0.0.0.0/8 169.254.0.0/16 100.100.100.200/32 224.0.0.0/4 240.0.0.0/4 ::/128 fe80::/10 fd00:ec2::254/128 ff00::/8"
)

# IPv6 prefix -> position of the IPv4 address that it carries, in bytes.
_CARRIERS = (
    (ipaddress.ip_network("::ffff:0:0/96"), 12),
    (ipaddress.ip_network("64:ff9b::/96"), 12),
    (ipaddress.ip_network("2002::/16"), 2),
)


def check_address(address: str, *, private: bool) -> None:
    """Check that a connection may go to an address.

    Args:
        address: an IPv4 or IPv6 address; an IPv6 zone is ignored.
        private: addresses that are not globally reachable are allowed as well.

    Raises:
        UsageError: it may not.
    """
    parsed = _unwrap(ipaddress.ip_address(address.partition("%")[0]))
    if any(parsed in network for network in _FORBIDDEN if network.version == parsed.version):
        raise UsageError(f"{address} is link-local, metadata, multicast or unspecified: no provider may be there")
    if not private and any(parsed in network for network in _NOT_GLOBAL if network.version == parsed.version):
        raise UsageError(
            f"{address} is not a global address: set private = true if the provider is inside your network"
        )


def check_url(url: str, *, private: bool) -> None:
    """Check the URL of a provider, before anything is connected to.

    Raises:
        UsageError: it is not https (http needs `private`), names more than host, port and path, or its host is an
            address that may not be connected to or is spelled in an unusual way.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{error}") from None
    if parts.scheme not in (("https", "http") if private else ("https",)):
        raise UsageError("it must begin with https://" + ("" if private else "; http needs private = true"))
    if not host or not re.fullmatch(r"[\x21-\x7e]+", url) or re.search(r"[@?#%\\]", url):
        raise UsageError("give host, port and path only: no user, query, fragment, % or blank")
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        try:
            check_address(host, private=private)
        except ValueError:
            raise UsageError(f"{host} is no IP address in its usual spelling") from None
    elif not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", host):
        raise UsageError(f"{host!r} is no host name")
    elif re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rpartition(".")[2]):
        raise UsageError(f"{host} is no IP address in its usual spelling")


def _unwrap(address: _Address) -> _Address:
    """Return the IPv4 address that an IPv6 address carries, or the address itself."""
    for network, start in _CARRIERS:
        if address.version == 6 and address in network:
            return ipaddress.IPv4Address(address.packed[start : start + 4])
    return address
