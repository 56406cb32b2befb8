"""A workflow's graph with a request's values in it, and the files that it then names."""

import base64
import hashlib
import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.api import references
from handler.api.dialects.comfy.nodes.loading import placed
from handler.api.dialects.comfy.plan import Folder, Load
from handler.api.workflows.fields import Field, Place
from handler.core.errors import InvalidValue
from handler.core.request import MAX_RANDOM_SEED

Read = Callable[[Load], bytes]


@dataclass(slots=True)
class Filled:
    """`graph` is a copy where it differs. `files` are those that it names and nobody else has."""

    graph: dict[str, Any]
    files: dict[str, Read] = field(default_factory=dict)

    def load(self, otherwise: Load) -> Load:
        """Reads these files, and any other as `otherwise` does."""

        def load(name: str, subfolder: str, folder: Folder) -> bytes:
            return self.files[name](otherwise) if name in self.files else otherwise(name, subfolder, folder)

        return load

    def put(self, place: Place, value: Any) -> None:
        """Write one value."""
        node, before = self.graph[place.node], self.value(place)
        held = {**before, place.key: value} if isinstance(before, dict) else value
        self.graph[place.node] = {**node, "inputs": {**node["inputs"], place.input: held}}

    def value(self, place: Place) -> Any:
        """What is there now."""
        return self.graph[place.node]["inputs"][place.input]

    def send(self, place: Place, data: bytes, read: Read) -> None:
        """Write the name of a file: by what it is, so that pictures of one request say the same."""
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.png"
        self.files[name] = read
        self.put(place, name)

    def mask(self, place: Place, data: bytes) -> None:
        """Write the name of the image that is there, with another alpha."""
        name = self.value(place)
        before = self.files.get(name)

        def read(otherwise: Load) -> bytes:
            return masked(before(otherwise) if before else otherwise(*placed(name)), data)

        self.send(place, data + name.encode(), read)


def filled(graph: Mapping[str, Any], fields: Sequence[Field], values: Mapping[str, Any]) -> Filled:
    """`graph` with `values`, by the names of their fields. A seed of -1, or that should be sent, is drawn at random."""
    found = Filled({**graph})
    given = {**dict.fromkeys((one.name for one in fields if one.seed and one.default is None), -1), **values}
    for one in sorted(fields, key=lambda one: one.masks):  # images before masks
        if one.name in given:
            _fill(found, one, given[one.name])
    return found


def _fill(found: Filled, one: Field, value: Any) -> None:
    if one.seed and value == -1:
        value = secrets.randbelow(MAX_RANDOM_SEED + 1)
    for place in one.places:
        if one.kind != "image":
            found.put(place, value)
        elif one.masks:
            found.mask(place, value)
        elif one.kept is None:
            found.put(place, base64.b64encode(value).decode())
        else:
            found.send(place, value, lambda _: bytes(value))


def masked(image: bytes, mask: bytes) -> bytes:
    """`image` as a PNG with the alpha of `mask`, which has its size. For a thread."""
    picture = references.upright(image, "image: the file").convert("RGB")
    alpha = references.upright(mask, "mask: the file").convert("RGBA").getchannel("A")
    if alpha.size != picture.size:
        both = "it is {}x{} and its image {}x{}".format(*alpha.size, *picture.size)
        raise InvalidValue(f"mask: {both}; send one of the image's size.", "mask")
    picture.putalpha(alpha)
    picture.save(file := io.BytesIO(), "PNG", compress_level=1)
    return file.getvalue()
