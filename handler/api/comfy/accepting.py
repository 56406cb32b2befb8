"""What is sent as a prompt, as the graph in API format that is read: a workflow as the page saves it is converted."""

import asyncio
import re
import uuid
from collections.abc import Mapping
from typing import Any

from handler.api.comfy.refusals import refused
from handler.api.dialects.comfy.ui.document import is_document, mapping
from handler.core.deadline import Deadline

ID = re.compile("[A-Za-z0-9_-]{1,100}")
Payload = dict[str, Any]


def id_of(payload: Mapping[str, Any]) -> str:
    """What a prompt is to be called."""
    given = payload.get("prompt_id")
    if given is None:
        return str(uuid.uuid4())
    if not isinstance(given, str) or not ID.fullmatch(given):
        raise refused("invalid_prompt_id", "prompt_id must be a valid UUID", "Send a UUID, or none.")
    return given


async def in_api_format(payload: Any, deadline: Deadline) -> tuple[Payload, tuple[str, ...]]:
    """`payload`, or the workflow that it is itself, with such a graph as its `prompt`, and notes for people.

    GraphRefused if it has none.
    A workflow that was sent in UI format is the picture's `workflow`, unless another one was sent for that.
    """
    payload = {"prompt": payload} if _bare(payload) else payload
    found = payload.get("prompt") if isinstance(payload, dict) else None
    if not isinstance(found, dict):
        raise refused("no_prompt", "No prompt provided", 'Send {"prompt": WORKFLOW}, in API or UI format.')
    if not is_document(found):
        return payload, ()
    return await deadline.hold(asyncio.to_thread(_converted, payload, found))


def _bare(payload: Any) -> bool:
    """Whether it is a workflow's file as it is, where ComfyUI wants that as `prompt`."""
    if not isinstance(payload, dict) or "prompt" in payload:
        return False
    return is_document(payload) or any(isinstance(one, dict) and "class_type" in one for one in payload.values())


def _converted(payload: Payload, found: Mapping[str, Any]) -> tuple[Payload, tuple[str, ...]]:
    from handler.api.dialects.comfy.ui.conversion import converted  # late: most workers never see one

    done = converted(found)
    extra = dict(mapping(payload.get("extra_data")))
    extra["extra_pnginfo"] = {"workflow": found, **mapping(extra.get("extra_pnginfo"))}
    return {**payload, "prompt": done.graph, "extra_data": extra}, done.notes
