"""ComfyUI's files over HTTP: pictures that are looked at, images that are sent to be worked from."""

import contextlib
import hashlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from handler.api.comfy.archive import FOLDERS, Archive
from handler.api.comfy.service import Comfy
from handler.api.comfy.shelf import Shelf, named
from handler.api.comfy.viewing import Shown, annotated, masked, shown
from handler.api.decoding import apart, perhaps
from handler.core.errors import FileMissing, InvalidValue, VolumeFailed
from handler.core.untrusted import Malformed, parse
from handler.server import bodies, multipart
from handler.server.patience import until

COPIES = 20  # of one name that have numbers: an upload is compared with all of them
YES = ("true", "1")


async def view(request: Request) -> Response:
    """A file of a folder."""
    query, archive = request.query_params, _archive(request)
    filename, folder = annotated(query.get("filename", ""), query.get("type", "output"))
    if filename.startswith("/") or ".." in filename or folder not in FOLDERS:
        raise InvalidValue("filename should be a file's name, and type output, input or temp.", "filename")
    inner, name = posixpath.split(filename)
    where = named(folder, posixpath.join(query.get("subfolder", ""), inner), name)
    try:
        data = await archive.at(lambda shelf: shelf.get(where))
    except FileNotFoundError:
        raise FileMissing("There is no such file.", "filename") from None
    except OSError:
        raise FileMissing("This file cannot be read.", "filename") from None
    show = partial(shown, data, name, query.get("preview", ""), query.get("channel", ""))
    found = await perhaps(show, until(request))
    return _told(found, name)


def _told(found: Shown, name: str) -> Response:
    way = "attachment" if found.attached else "inline"
    headers = {"content-disposition": f"{way}; filename*=utf-8''{quote(name)}"}
    return Response(found.data, headers=headers, media_type=found.media)


async def upload_image(request: Request) -> Any:
    """Keep an image, under its own name or, if another has that, one with a number."""
    sent, comfy = await _sent(request), _comfy(request)
    kept = await comfy.archive.at(lambda shelf: _kept(shelf, sent, sent.data))
    comfy.begin(comfy.tidy())
    return kept


async def upload_mask(request: Request) -> Any:
    """Keep an image that was sent before with the alpha channel of the one that is sent now."""
    sent = await _sent(request)
    filename, subfolder, folder = _original(sent)

    comfy, archive = _comfy(request), _archive(request)
    try:
        original = await archive.at(lambda shelf: shelf.get(named(folder, subfolder, filename)))
    except OSError:
        raise FileMissing("There is no such original.", "original_ref") from None
    made = await apart(partial(masked, original, sent.data), until(request))
    kept = await archive.at(lambda shelf: _kept(shelf, sent, made))
    comfy.begin(comfy.tidy())
    return kept


@dataclass(frozen=True, slots=True)
class Sent:
    """A form: the file in `image` with its name, and the fields that are text."""

    data: bytes
    name: str
    fields: Mapping[str, str]


async def _sent(request: Request) -> Sent:
    read = partial(multipart.parts, request.headers)
    sent = {part.name: part for part in await bodies.understood(read, await bodies.read(request), until(request))}
    file = sent.get("image")
    if not file or not file.filename:
        raise InvalidValue("Send a file as 'image', with its name.", "image")
    return Sent(file.data, file.filename, {name: part.text for name, part in sent.items() if part.filename is None})


def _kept(shelf: Shelf, sent: Sent, data: bytes) -> dict[str, str]:
    """Where an image is kept now. For a thread."""
    folder, subfolder = sent.fields.get("type", "input"), sent.fields.get("subfolder", "")
    if folder not in FOLDERS:
        raise InvalidValue("type can be input, temp or output.", "type")
    start, end = posixpath.splitext(sent.name)
    for number in range(COPIES + 1):
        called = f"{start} ({number}){end}" if number else sent.name
        if number == COPIES:
            called = f"{start} ({hashlib.sha256(data).hexdigest()[:16]}){end}"
        where = named(folder, subfolder, called)
        try:
            shelf.put(where, data, anew=sent.fields.get("overwrite") not in YES)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # it is a folder, or gone again
                if shelf.get(where) == data:
                    return {"name": called, "subfolder": subfolder, "type": folder}
        except OSError as error:
            raise VolumeFailed(f"The file cannot be kept: {error.strerror}.") from None
        else:
            return {"name": called, "subfolder": subfolder, "type": folder}
    raise InvalidValue("There are too many files with this name.", "image")


def _original(sent: Sent) -> tuple[str, str, str]:
    """Name, subfolder and folder of the image that a mask is for."""
    try:
        said = parse(sent.fields.get("original_ref", ""))
        filename, folder = annotated(said["filename"], said.get("type", "output"))
        subfolder = said.get("subfolder", "")
    except (Malformed, TypeError, KeyError, AttributeError):
        raise InvalidValue("original_ref should be JSON with a filename.", "original_ref") from None
    if folder not in FOLDERS or not isinstance(subfolder, str):
        raise InvalidValue("original_ref names no folder that there is.", "original_ref")
    return filename, subfolder, folder


def _comfy(request: Request) -> Comfy:
    found: Comfy = request.app.state.comfy
    return found


def _archive(request: Request) -> Archive:
    return _comfy(request).archive
