"""Pictures in an object store that speaks S3, for answers that carry a URL in the place of bytes.

A key is `PREFIX/MODEL/SHA256.png`, of the picture's own bytes: a retry, or a job that its platform gives again, writes
the same object once more rather than another, and an object never changes, so caches may keep it as long as its URL
works. Whoever can name the key has the picture already; in a private bucket only the presigned URL opens it.
Keys by RunPod's names are read for each picture: a process that was restored from a snapshot may have new ones.

A picture that was drawn is paid for. If the store does not take it, after a bounded number of tries and in the time
that whoever waits has left, `Store.keep` says why and leaves the bytes where they are. Why is told in our own words:
what libraries and servers say may quote a key.
"""

import asyncio
import hashlib
import io
import logging
import re
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Self

from handler.api.hands import Hands
from handler.core.deadline import Deadline
from handler.core.recipe import Picture
from handler.core.settings import Settings, bucket_keys

TRIES = 3
CONNECT_S, READ_S = 10.0, 10.0  # of one try; urllib3 counts sending with connecting
DEADLINE_S = 30.0  # of all tries together
THREADS = 8
SPARE = 56  # READ_S is of one reading: a store that sends a byte now and then holds an upload for long
# As worker-comfyui's users write it.
AWS_BUCKET = re.compile(r"https://(?P<bucket>[a-z0-9.-]+)\.s3[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com/?")
WHY = {  # by the store's code, by the status where an answer has no body, or by the library's error
    "NoSuchBucket": "there is no such bucket",
    "404": "there is no such bucket",
    "InvalidAccessKeyId": "it does not know the access key",
    "SignatureDoesNotMatch": "the secret does not fit the access key",
    "ExpiredToken": "the credentials have expired",
    "AccessDenied": "the credentials may not do this",
    "403": "it refuses the credentials, or they may only write",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "NoCredentialsError": "no credentials were found",
    "PartialCredentialsError": "of the credentials one half is missing",
    "EndpointConnectionError": "it cannot be reached",
    "ConnectTimeoutError": "it cannot be reached",
    "ReadTimeoutError": "it does not answer",
    "ConnectionClosedError": "the connection broke",
    "SSLError": "its certificate is not trusted",
}
SLOW, SHORT = f"it took longer than {DEADLINE_S:g} s", "it did not answer in the time that the request had left"
# Their own, so that a dead store holds up neither the encoding of pictures that need none nor the end of the process.
_hands = Hands(THREADS, SPARE, "upload")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Store:
    """One bucket: what settings say of it, and nothing that is open or secret. It is for any thread."""

    bucket: str
    endpoint: str
    region: str
    prefix: str
    expires_s: int

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """The store that `settings` name, if any."""
        bucket, endpoint, region = settings.store_bucket, settings.store_endpoint, settings.store_region
        if found := AWS_BUCKET.fullmatch(endpoint):
            bucket, endpoint, region = bucket or found["bucket"], "", region or found["region"]
        if not bucket:
            return None
        return cls(bucket, endpoint, region, settings.store_prefix, settings.store_expires_s)

    async def keep(self, picture: Picture, deadline: Deadline) -> Picture:
        """`picture` with the URL where it now is too, or with why it is not, in time for an answer by `deadline`.

        Takes `DEADLINE_S` at most.
        """
        start = time.perf_counter()
        body = Body(picture.data)
        running = _hands.run(partial(self._put, picture, body))
        upload = asyncio.wrap_future(running)
        short = asyncio.ensure_future(deadline.short())
        either: set[asyncio.Future[Any]] = {upload, short}
        try:
            await asyncio.wait(either, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            url, why = _outcome(upload, SHORT if short.done() else SLOW)
        finally:
            short.cancel()
            upload.cancel()
            body.unwanted = True
            _hands.forsake(running)
        if why:
            log.warning("the object store did not take a picture: %s", why)
        stages = {**picture.stages, "upload": time.perf_counter() - start}
        return replace(picture, url=url, undelivered=why, stages=stages)

    def unreachable(self) -> str:
        """Why the bucket cannot be reached; empty if it can."""
        try:
            self.client().head_bucket(Bucket=self.bucket)
        except Exception as error:
            return reason(error)
        return ""

    def _put(self, picture: Picture, body: "Body") -> str:
        """Write the picture; a URL that opens it for `expires_s` seconds."""
        name = f"{picture.recipe.model}/{hashlib.sha256(picture.data).hexdigest()}.{picture.format}"
        place = {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}".lstrip("/")}
        client = self.client()
        client.put_object(
            **place,
            Body=body,
            ContentType=f"image/{picture.format}",
            CacheControl=f"private, max-age={self.expires_s}, immutable",
        )
        return str(client.generate_presigned_url("get_object", Params=place, ExpiresIn=self.expires_s))

    def client(self) -> Any:
        """boto3's; what it raises may quote a key, so that only `reason` of it is to be told."""
        return _client(self, *bucket_keys())


class Body(io.BytesIO):
    """A picture on its way, which breaks off once it is `unwanted`: of half a body a store keeps nothing.

    What it raises is no `Exception`, after which boto3 would try again.
    """

    unwanted = False

    def read(self, size: int | None = -1) -> bytes:
        """As it is; for the thread that sends it."""
        if self.unwanted:
            raise asyncio.CancelledError
        return super().read(size)


@lru_cache(maxsize=1)  # keys that were replaced take their connections with them
def _client(store: Store, key: str, secret: str) -> Any:
    """boto3's client, made for the first picture: importing it takes half a second that no cold start should wait.

    Any thread may use it. Without a key, boto3 finds credentials where it always does.
    """
    from boto3.session import Session
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.WARNING)  # below, it tells what it signs, URLs and tokens included
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"total_max_attempts": TRIES, "mode": "standard"},
        max_pool_connections=THREADS + SPARE,
        s3={"addressing_style": "path" if store.endpoint else "auto"},
        request_checksum_calculation="when_required",  # what boto3 sends otherwise, R2 and GCS do not understand
        response_checksum_validation="when_required",
    )
    keys = {"aws_access_key_id": key or None, "aws_secret_access_key": secret or None}
    place = {"region_name": store.region or None, "endpoint_url": store.endpoint or None}  # None is what boto3 finds
    return Session().client("s3", config=config, **place, **keys)


def _outcome(upload: asyncio.Future[str], late: str) -> tuple[str, str]:
    """The URL, or why there is none: `late` if the upload has not ended."""
    if not upload.done():
        return "", late
    error = upload.exception()
    return ("", reason(error)) if error else (upload.result(), "")


def reason(error: BaseException) -> str:
    """What went wrong, in our words; of what is not foreseen only the status or the error's name."""
    answer = getattr(error, "response", None)
    if not isinstance(answer, dict):
        name = type(error).__name__
        return WHY.get(name, name)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return WHY.get(answer.get("Error", {}).get("Code"), f"it answered with status {status}")
