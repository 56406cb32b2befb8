"""Who asks, where several may: what is kept between requests is kept apart by this."""

from contextvars import ContextVar

CALLER: ContextVar[bytes] = ContextVar("caller", default=b"")  # the digest of the key that was known
