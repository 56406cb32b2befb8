"""Every request of ours to a host that a caller names: an image to be fetched, a webhook to be told.

Only listed hosts are asked, and a name counts for nothing but what it resolves to: each address must be one of the
public internet, unless the list has that very address, with the same port, or localhost. The connection is made to
the address that was looked at, so that a name which leads elsewhere the next moment leads nowhere. Redirects are for
whoever asks to follow, as new requests. What an answer may take of time and memory is bounded. Why something failed
is told in our words, and names no more of a URL than its host: what follows it may be a secret.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cache, partial
from http.client import HTTPException, parse_headers
from io import BytesIO
from typing import Self
from urllib.parse import urlsplit

from handler.api.hands import Hands
from handler.api.loras import looked
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded
from handler.core.version import __version__

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]
AT_ONCE = 8  # requests whose images are fetched: what they hold until then is counted nowhere
PORTS = {"http": 80, "https": 443}
URL = re.compile(r"https?://[!-~]{1,4000}", re.IGNORECASE)
HEAD = 64 << 10  # bytes of an answer's head
INTERIM = 3  # heads that may come before that of the answer (100 to 199)
# Not of the public internet, whatever Python's version knows of it (iana.org/assignments/iana-ipv4-special-registry);
# the last one is where Azure's machines find their host.
INNER = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        ),
    )
)
GLOBAL = ipaddress.IPv6Network("2000::/3")  # all that is unicast and global, but for what is told here
INNER_6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 in IPv6 (RFC 6052)
_hands = Hands(4, 4, "names")  # a resolver that hangs holds up neither volumes nor the end of the process


class Unreachable(Exception):
    """Why nothing came of a request, after the name of its host."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: `where` is path and query."""

    scheme: str
    host: str
    port: int
    where: str

    @classmethod
    def of(cls, url: str) -> Self:
        """Taken apart; Unreachable if that is no URL that we ask."""
        try:
            parts = urlsplit(url if URL.fullmatch(url) else "")
            scheme, host = parts.scheme, (parts.hostname or "").rstrip(".")
            port = parts.port or PORTS[scheme]
        except (ValueError, KeyError):
            host = ""
        if not host or "@" in parts.netloc or "\\" in url:
            raise Unreachable("is no http or https URL of ASCII letters and without a password")
        return cls(scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    @property
    def named(self) -> str:
        """Host and, where it is not the scheme's, port, as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Message
    body: bytes = field(repr=False)


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name. For a thread."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def public(address: Address) -> bool:
    """Whether an address is of the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in INNER)
    if address in TRANSLATED:
        return public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in GLOBAL and not any(address in network for network in INNER_6)


class Outgoing:
    """Asks the hosts of one list, such as `images.example`, `10.0.0.5:9000` or `localhost:8080`.

    Without a port the scheme's own is meant.
    """

    def __init__(self, hosts: tuple[str, ...], resolve: Resolve = resolved) -> None:
        listed = [urlsplit(f"//{host}") for host in hosts]
        self._listed = {(each.hostname or "", each.port) for each in listed}
        self._resolve = resolve
        self.turns = asyncio.Semaphore(AT_ONCE)

    def __bool__(self) -> bool:
        return bool(self._listed)

    def lists(self, target: Target) -> bool:
        """Whether this host may be asked at all."""
        usual = target.port == PORTS[target.scheme]
        return (target.host, target.port) in self._listed or (usual and (target.host, None) in self._listed)

    async def ask(
        self, method: str, target: Target, headers: Mapping[str, str], body: bytes, seconds: float, most: int
    ) -> Answer:
        """One request, whose answer's body has at most so many bytes, or is not read if that is 0.

        Raises Unreachable, also once `seconds` are over.
        """
        if not self.lists(target):
            raise Unreachable("is not among the hosts that may be asked")
        try:
            async with asyncio.timeout(seconds):
                addresses = await looked(
                    partial(self._resolve, target.host, target.port), Deadline.within(seconds), _hands
                )
                return await _asked(method, target, self._checked(target, addresses), headers, body, most)
        except Unreachable:
            raise
        except (TimeoutError, DeadlineExceeded):
            raise Unreachable("did not answer in time") from None
        except ssl.SSLError:
            raise Unreachable("has no certificate that is trusted") from None
        except (OSError, UnicodeError):
            raise Unreachable("cannot be reached") from None
        except asyncio.IncompleteReadError:
            raise Unreachable("broke the connection off") from None
        except (ValueError, HTTPException, asyncio.LimitOverrunError):
            raise Unreachable("sent something that is no answer in HTTP") from None

    def _checked(self, target: Target, addresses: list[str]) -> list[str]:
        """`addresses`, if all of them may be asked: a name that also leads inside is nobody's by mistake."""
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            local = target.host == "localhost" and address.is_loopback
            if not (public(address) or local or self.lists(replace(target, host=str(address)))):
                raise Unreachable("is at an address that is not public, and not listed itself")
        return addresses


async def _asked(
    method: str, target: Target, addresses: list[str], headers: Mapping[str, str], body: bytes, most: int
) -> Answer:
    reader, writer = await _connected(target, addresses)
    try:
        own = {"Host": target.named, "User-Agent": f"kindling/{__version__}", "Connection": "close"}
        length = {"Content-Length": str(len(body))} if body else {}
        lines = [f"{method} {target.where} HTTP/1.1", *(f"{k}: {v}" for k, v in {**own, **length, **headers}.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        await writer.drain()
        for _ in range(INTERIM):
            status, found = await _head(reader)
            if status >= 200:
                return Answer(status, found, await _body(reader, found, most) if most else b"")
        raise ValueError("no end of heads")
    finally:
        writer.transport.abort()


async def _connected(target: Target, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first address that takes it; the certificate must be the name's."""
    secure = {"ssl": _trusted(), "server_hostname": target.host} if target.scheme == "https" else {}
    error = OSError("no address")
    for address in addresses:
        try:
            return await asyncio.open_connection(address, target.port, limit=HEAD, **secure)  # type: ignore[arg-type]
        except ssl.SSLError:
            raise
        except OSError as failed:
            error = failed
    raise error


@cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _head(reader: asyncio.StreamReader) -> tuple[int, Message]:
    """An answer's status and headers."""
    head = BytesIO(await reader.readuntil(b"\r\n\r\n"))
    version, status, *_ = head.readline().split(maxsplit=2)
    if not version.startswith(b"HTTP/1.") or len(status) != 3:
        raise ValueError("no status line")
    return int(status), parse_headers(head)


async def _body(reader: asyncio.StreamReader, headers: Message, most: int) -> bytes:
    """What follows a head, in whichever way it says where that ends; never more than it may be."""
    if headers.get("transfer-encoding"):
        return await _chunks(reader, most)
    said = headers.get("content-length")
    if said is not None:
        return await reader.readexactly(_within(int(said), most))
    data = bytearray()
    while part := await reader.read(HEAD):
        data += part
        _within(len(data), most)
    return bytes(data)


async def _chunks(reader: asyncio.StreamReader, most: int) -> bytes:
    data = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        _within(len(data) + size, most)
        data += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(data)


def _within(size: int, most: int) -> int:
    if size > most:
        raise Unreachable(f"sends more than {most / 1e6:g} MB")
    return size
