"""Group nodes, which pages had before subgraphs: read as subgraphs, which they nearly are."""

from collections.abc import Callable, Mapping
from typing import Any

from handler.api.dialects.comfy.ui.document import Document
from handler.api.dialects.comfy.ui.orders import Order


def with_groups(read: Document, found: Mapping[str, Any], order: Callable[[str], Order | None]) -> Document:
    """A document with a subgraph for each of the file's group nodes."""
    return read
