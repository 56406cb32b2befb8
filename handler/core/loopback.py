"""Which addresses and names are this machine's own."""

import ipaddress
from functools import lru_cache


@lru_cache(64)
def is_loopback(host: str) -> bool:
    """Whether an address, or the name of one, is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
