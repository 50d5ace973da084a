"""Mail addresses: one spelling for one mailbox, so that a comparison of texts is a comparison of mailboxes.

Every door normalises an address here: signing up and in, an identity provider, the first admin, the command line.
"""

import re
import unicodedata

import idna

from unmask.errors import UsageError

_MAX_LOCAL_BYTES = 64  # RFC 5321, 4.5.3.1
_MAX_LENGTH = 254
_MAX_DOMAIN_LENGTH = 253  # RFC 1035, 2.3.4: 255 bytes with the lengths of the labels, in the form with xn--
# Atoms between dots (RFC 5321), and letters beyond ASCII (RFC 6531). Quoted parts are left out: nobody types them, and
# they hide other addresses.
_LOCAL = re.compile(r"[^\x00-\x20\x7f\"(),:;<>@\[\\\]]+")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# Characters that are letters or marks by their category and show nothing (Unicode's Default_Ignorable_Code_Point).
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def normalize_email(email: str) -> str:
    """Return a mail address as it is stored and compared: in lower case and NFC, and its domain without xn--.

    Blanks around it are left out, as browsers leave them out. Nothing else is repaired: an address in another form
    could be meant for another mailbox, or look like one that it is not.

    >>> normalize_email(" Ada@XN--EXMPLE-CUA.org ")
    'ada@exämple.org'

    Raises:
        UsageError: it is no address, is a display form such as `Ada <ada@example.org>`, or holds control characters,
            invisible ones, or characters that only look like others (full-width letters, the Kelvin sign).
    """
    text = email.strip(" ")
    composed = unicodedata.normalize("NFC", text)
    local, at, domain = composed.lower().rpartition("@")
    if not at or "@" in local or any(character in text for character in '<>,;:"() \t'):
        raise _refusal("give the address alone, without a name or angle brackets" if at else "")
    if not text.isprintable() or _INVISIBLE.search(composed):
        raise _refusal("it holds a character that does not show")
    if unicodedata.normalize("NFKC", composed) != composed or any(map(_is_disguised, text)):
        raise _refusal("it holds a character that looks like another; type it anew")
    # Lower case can take a composed letter apart.
    local = unicodedata.normalize("NFC", local)
    if not _LOCAL.fullmatch(local) or "" in local.split(".") or len(local.encode()) > _MAX_LOCAL_BYTES:
        raise _refusal("the part before the @ cannot be")
    address = f"{local}@{_domain(domain)}"
    if len(address.encode()) > _MAX_LENGTH:
        raise _refusal("it is too long")
    return address


def stored_spellings(email: str) -> list[str]:
    """Return the spellings under which a mailbox may be stored, the likeliest first.

    Accounts from before `normalize_email` are stored in lower case as they were typed: in NFD, with xn-- in the domain,
    or in a form that is refused today.

    >>> stored_spellings("Ada@exämple.org")[0]
    'ada@exämple.org'
    """
    typed = email.strip(" ").lower()
    try:
        address = normalize_email(email)
    except UsageError:
        # Some letters beyond ASCII become ASCII in lower case, as the Kelvin sign becomes k. Such an address must not
        # match the ASCII address of another person.
        disguised = any(not character.isascii() and character.lower().isascii() for character in email)
        return [typed] if len(typed) <= _MAX_LENGTH and typed.isprintable() and not disguised else []
    local, _, domain = address.rpartition("@")
    others = [f"{local}@{name}" for name in (domain, _ascii_domain(domain))]
    others += [unicodedata.normalize("NFD", other) for other in others]
    return list(dict.fromkeys([typed, *others]))


def _is_disguised(character: str) -> bool:
    """True for a character beyond ASCII that normalisation or lower case turns into ASCII, such as the Kelvin sign."""
    return not character.isascii() and (
        unicodedata.normalize("NFKC", character).isascii() or character.lower().isascii()
    )


def _domain(text: str) -> str:
    """Return a domain in lower case with the letters of international names, as IDNA 2008 has them."""
    try:
        return ".".join(idna.decode(label) for label in _ascii_domain(text).split("."))
    except UnicodeError:
        raise _refusal("there is no such domain") from None


def _ascii_domain(text: str) -> str:
    """Return a domain as name servers know it, with xn-- where it has international letters.

    This form has the limits of length: one label of a single umlaut takes ten bytes of it, and three of an address.
    """
    try:
        # Label by label: a domain as a whole may have other dots than the full stop.
        labels = [idna.encode(label).decode("ascii") for label in text.split(".")]
    except UnicodeError:
        raise _refusal("there is no such domain") from None
    domain = ".".join(labels)
    if len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)) or len(labels[-1]) < 2 or labels[-1].isdecimal():
        raise _refusal("there is no such domain")
    if len(domain) > _MAX_DOMAIN_LENGTH:
        raise _refusal("its domain is too long")
    return domain


def _refusal(reason: str) -> UsageError:
    return UsageError(f"that is no mail address: {reason + '; ' if reason else ''}write it like name@example.org")
