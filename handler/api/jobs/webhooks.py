"""Webhooks: who asked for a job is told that it has ended, signed as Standard Webhooks has it.

See github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md: `webhook-id` is the same in
every try, `webhook-timestamp` is that of the try, and `webhook-signature` is HMAC-SHA256 over both and the body. Only
listed hosts are told, over https unless they are this machine, and no redirect is followed.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import time

from handler.api.outgoing import Outgoing, Target, Unreachable
from handler.core.errors import InvalidType, InvalidValue, SettingsError, Unsupported
from handler.core.settings import Settings

WAITS_S = (1.0, 5.0, 25.0, 125.0)  # between tries
SECONDS = 15.0  # for a try
LOOPBACK = ("localhost", "::1")
GONE = 410  # who answers so wants no more
PREFIX = "whsec_"
log = logging.getLogger(__name__)


class Webhooks:
    """Tells hosts of jobs. `trying` is how many tries are under way, or about to be. For one event loop."""

    def __init__(self, settings: Settings) -> None:
        if settings.webhook_hosts and not settings.webhook_secret:
            raise SettingsError(
                "Webhooks are signed: KINDLING_WEBHOOK_SECRET should be whsec_ and, after that, what "
                "'openssl rand -base64 32' prints.",
                "KINDLING_WEBHOOK_SECRET",
            )
        self._outgoing, self._secret = Outgoing(settings.webhook_hosts), settings.webhook_secret
        self._tasks = set[asyncio.Task[None]]()
        self.trying = 0

    def target(self, url: object) -> Target:
        """Where `url` leads; raises what says why nobody is told there."""
        if not isinstance(url, str):
            raise InvalidType("webhook: Input should be a URL.", "webhook")
        if not self._outgoing:
            raise Unsupported(
                "webhook: this worker tells no host of jobs; KINDLING_WEBHOOK_HOSTS lists those.", "webhook"
            )
        try:
            target = Target.of(url)
        except Unreachable as error:
            raise InvalidValue(f"webhook {error}.", "webhook") from None
        if not self._outgoing.lists(target):
            raise Unsupported(f"webhook: KINDLING_WEBHOOK_HOSTS does not list {target.named[:80]}.", "webhook")
        if target.scheme != "https" and target.host not in LOOPBACK and not target.host.startswith("127."):
            raise InvalidValue("webhook should be an https URL, for what it is told is not for others.", "webhook")
        return target

    def begin(self, target: Target, message_id: str, body: bytes) -> asyncio.Task[None]:
        """Tell it, again and again if need be, while nobody waits."""
        self.trying += 1
        task = asyncio.create_task(self._tell(target, message_id, body))
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._ended(task, target))
        return task

    def _ended(self, task: asyncio.Task[None], target: Target) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            log.warning("a webhook was not taken: %s was not there before this worker ended", target.named)

    async def _tell(self, target: Target, message_id: str, body: bytes) -> None:
        for wait_s in (*WAITS_S, None):
            try:
                why, last = await self._try(target, message_id, body)
            finally:
                self.trying -= 1
            if not why:
                return
            if last or wait_s is None:
                return log.warning("a webhook was not taken: %s %s", target.named, why)
            await asyncio.sleep(wait_s)
            self.trying += 1

    async def _try(self, target: Target, message_id: str, body: bytes) -> tuple[str, bool]:
        """Why this try failed, if it did, and whether there is to be no other."""
        headers = {"Content-Type": "application/json", **signed(self._secret, message_id, int(time.time()), body)}
        try:
            answer = await self._outgoing.ask("POST", target, headers, body, SECONDS, 0)
        except Unreachable as error:
            return str(error), False
        return ("" if 200 <= answer.status < 300 else f"answered with status {answer.status}"), answer.status == GONE


def signed(secret: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that say who wrote `body`; `secret` is whsec_ and the key in base64."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
