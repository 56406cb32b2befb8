"""Input images by URL, from hosts that KINDLING_FETCH_HOSTS lists: they are fetched before all else is read."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urljoin

from handler.api.dialects.aliases import NAMES
from handler.api.outgoing import Answer, Outgoing, Target, Unreachable
from handler.core.attachments import FETCHED, MAX_REFERENCES
from handler.core.deadline import Deadline
from handler.core.errors import InvalidValue, OutOfRange

# Fields that may have a URL, a list of them, or an object with one, in whichever dialect.
FIELDS = ("images", "mask", *(name for name, field in NAMES.items() if field in ("images", "mask")))
INNER = "image_url"  # in such an object
WITHIN = "parameters"  # where Hugging Face's client has all but the prompt
MOST = MAX_REFERENCES + 1  # and a mask
REDIRECTS = 3
MOVED = (301, 302, 303, 307, 308)
SECONDS = 30.0  # for one image, and never more than the request has left
PLAIN = ("", "application/octet-stream", "binary/octet-stream")  # what stores say where nobody told them


async def filled(
    payload: dict[str, Any], outgoing: Outgoing, most: int, deadline: Deadline, names: Sequence[str] = FIELDS
) -> dict[str, Any]:
    """`payload` with the bytes of its images in the place of their URLs; all of them have at most `most` bytes.

    They are in the fields `names`, or in those of what is `WITHIN` it. Raises InvalidValue naming the field of one that
    cannot be had, DeadlineExceeded once `deadline` is over.
    """
    if isinstance(inner := payload.get(WITHIN), dict):
        fields = {name: value for name, value in inner.items() if name != WITHIN}
        return payload | {WITHIN: inner | await filled(fields, outgoing, most, deadline, names)}
    wanted = {url: name for name in names for url in _urls(payload.get(name))}
    if not outgoing or not wanted:
        return payload
    if len(wanted) > MOST:
        raise OutOfRange(f"images: at most {MOST} URLs are fetched for a request.", "images")
    found = await deadline.hold(_all(wanted, outgoing, most, deadline))
    return payload | {name: _with(payload[name], found) for name in names if name in payload}


async def _all(wanted: dict[str, str], outgoing: Outgoing, most: int, deadline: Deadline) -> dict[str, bytes]:
    """The files at the URLs, each of which is in a field, one after another."""
    found: dict[str, bytes] = {}
    async with outgoing.turns:
        for url, name in wanted.items():
            found[url] = await _fetched(url, name, outgoing, most - sum(map(len, found.values())), deadline)
    return found


def _urls(value: Any) -> list[str]:
    """Those in a field."""
    if isinstance(value, str):
        return [value] if FETCHED.match(value.lstrip()) else []
    if isinstance(value, dict):
        return _urls(value.get(INNER)) if isinstance(value.get(INNER), str) else []
    flat = [each for each in value if not isinstance(each, list)] if isinstance(value, list) else []
    return [url for each in flat for url in _urls(each)]


def _with(value: Any, found: dict[str, bytes]) -> Any:
    if isinstance(value, list):
        return [each if isinstance(each, list) else _with(each, found) for each in value]
    if isinstance(value, dict) and isinstance(value.get(INNER), str):
        return value | {INNER: _with(value[INNER], found)}
    return found.get(value, value) if isinstance(value, str) else value


async def _fetched(url: str, name: str, outgoing: Outgoing, most: int, deadline: Deadline) -> bytes:
    """The file at `url`, wherever that leads."""
    host, start = "its URL", Deadline.within(min(SECONDS, deadline.left_s))
    try:
        target = Target.of(url.strip())
        for _ in range(REDIRECTS + 1):
            host = target.host[:80]
            answer = await outgoing.ask("GET", target, {"Accept": "image/*"}, b"", start.left_s, max(most, 1))
            if answer.status not in MOVED or not (there := answer.headers.get("location")):
                return _image(answer)
            url = _joined(url.strip(), there)
            secure, target = target.scheme == "https", Target.of(url)
            if secure and target.scheme != "https":
                raise Unreachable("leads on to a URL without https")
        raise Unreachable(f"leads on more than {REDIRECTS} times")
    except Unreachable as error:
        raise InvalidValue(f"{name}: {host} {error}. KINDLING_FETCH_HOSTS lists who is asked.", name) from None


def _joined(url: str, there: str) -> str:
    try:
        return urljoin(url, there)
    except ValueError:
        raise Unreachable("leads on to what is no URL") from None


def _image(answer: Answer) -> bytes:
    """The body of an answer that may be an image; what it is, is known by its own bytes."""
    if answer.status != 200:
        raise Unreachable(f"answered with status {answer.status}")
    kind = answer.headers.get_content_type() if "content-type" in answer.headers else ""
    if not kind.startswith("image/") and kind not in PLAIN:
        raise Unreachable(f"sent {kind:.60}, which is no image")
    return answer.body
