"""What ComfyUI's page asks of its server beside the routes of all clients: what it keeps, and what there is none of.

There are no users here, no extensions, no templates, and no log that it could show.
"""

import asyncio
import json
from dataclasses import asdict
from typing import Any
from urllib.parse import quote, unquote

from starlette.requests import Request
from starlette.responses import Response

from handler.api.comfy import userdata
from handler.api.comfy.archive import Archive
from handler.api.comfy.served import choices
from handler.api.comfy.service import Comfy
from handler.api.dialects.comfy.plan import Served
from handler.core.errors import FileMissing, InvalidType
from handler.server import bodies
from handler.server.comfy.routes import Handler
from handler.server.patience import until

MEDIA = {"css": "text/css; charset=utf-8", "json": "application/json"}  # of files by suffix; of others DOWNLOADED
DOWNLOADED = "application/octet-stream"
ANY = ("text/plain", "text/css", DOWNLOADED)  # as what a file may be sent, beside JSON
ABSENT = {  # what the page asks for whether there is one or not
    "user.css": b"",
    "comfy.templates.json": b"[]",
    "workflows/.index.json": b"{}",
}
CHANGED = {"Comfy.TutorialCompleted": True}  # from the page's own: its first steps lead through examples


class Desk:
    """The page's routes."""

    def __init__(self) -> None:
        self._settings = asyncio.Lock()  # the page sends several at once, and each is read and written as a whole

    def routes(self) -> dict[str, dict[str, Handler]]:
        """All, as `routes.ROUTES` has the others."""
        return {
            "/settings": {"GET": get_settings, "POST": self.post_settings},
            "/settings/{name}": {"GET": get_setting, "POST": self.post_setting},
            "/userdata": {"GET": list_files},
            "/userdata/{file:path}": {"GET": get_file, "POST": post_file, "DELETE": delete_file},
            "/experiment/models": {"GET": get_folders},
            "/experiment/models/{folder}": {"GET": get_folder},
            "/internal/files/input": {"GET": get_inputs},
            **{path: {"GET": _always(value)} for path, value in ALWAYS.items()},
        }

    async def post_settings(self, request: Request) -> Any:
        """Change some."""
        said = await _json(request)
        if not isinstance(said, dict):
            raise InvalidType("The body should be a JSON object.")
        return await self._change(request, said)

    async def post_setting(self, request: Request) -> Any:
        """Change one."""
        return await self._change(request, {request.path_params["name"]: await _json(request)})

    async def _change(self, request: Request, said: dict[str, Any]) -> Response:
        async with self._settings:
            found = await _archive(request).at(userdata.settings) | said
            data = json.dumps(found, indent=2).encode()
            await _archive(request).at(lambda shelf: userdata.write(shelf, userdata.SETTINGS, data))
        return Response()


async def get_settings(request: Request) -> Any:
    """All that were changed, here or by a person."""
    return CHANGED | await _archive(request).at(userdata.settings)


async def get_setting(request: Request) -> Any:
    """One; null if it was not changed."""
    return (await get_settings(request)).get(request.path_params["name"])


async def list_files(request: Request) -> Any:
    """The files of a folder, as a person's workflows are."""
    query = request.query_params
    folder, deep = query.get("dir", ""), query.get("recurse") == "true"
    found = await _archive(request).at(lambda shelf: list(userdata.listed(shelf, folder, deep)))
    if query.get("full_info") == "true":
        return [asdict(each) for each in found]
    return [[each.path, *each.path.split("/")] if query.get("split") == "true" else each.path for each in found]


async def get_file(request: Request) -> Any:
    """A file."""
    file, _ = _named(request)
    try:
        data = await _archive(request).at(lambda shelf: userdata.read(shelf, file))
    except FileMissing:
        if file not in ABSENT:
            raise
        data = ABSENT[file]
    return Response(data, media_type=MEDIA.get(file.rpartition(".")[2], DOWNLOADED))


async def post_file(request: Request) -> Any:
    """Keep a file, or move one."""
    (file, other), query = _named(request), request.query_params
    anew = query.get("overwrite") == "false"
    data = await bodies.read(request, *ANY)
    try:
        if other is None:
            kept = await _archive(request).at(lambda shelf: userdata.write(shelf, file, data, anew))
        else:
            anew = query.get("overwrite") != "true"
            kept = await _archive(request).at(lambda shelf: userdata.move(shelf, file, other, anew))
    except FileExistsError:
        return Response("There is such a file already.", 409, media_type="text/plain")
    return asdict(kept) if query.get("full_info") == "true" else kept.path


async def delete_file(request: Request) -> Any:
    """Remove a file."""
    file, _ = _named(request)
    await _archive(request).at(lambda shelf: userdata.remove(shelf, file))
    return Response(status_code=204)


async def get_folders(request: Request) -> Any:
    """The folders of models. Where they lie is nobody's business."""
    found = await _served(request)
    return [{"name": name, "folders": [name]} for name in found.files if name != "input"]


async def get_folder(request: Request) -> Any:
    """The models of one."""
    found, folder = await _served(request), request.path_params["folder"]
    return [{"name": name, "pathIndex": 0} for name in choices(folder, found)] if folder in found.files else []


async def get_inputs(request: Request) -> Any:
    """The files that were sent, the latest first."""
    return [*reversed((await _served(request)).files["input"])]


def _always(value: Any) -> Handler:
    async def answer(request: Request) -> Any:
        return value

    return answer


ALWAYS: dict[str, Any] = {
    "/users": {"storage": "server", "migrated": True},
    "/extensions": [],
    "/i18n": {},
    "/workflow_templates": {},
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/view_metadata/{folder}": {},
    "/internal/folder_paths": {},
    "/internal/logs": "",
    "/internal/logs/raw": {"entries": [], "size": {"cols": 80, "rows": 24}},
}


def _named(request: Request) -> tuple[str, str | None]:
    """The file that a path names, and the one that it shall become, if it says so.

    The page quotes the slashes in their names, so that the path is looked at as it came.
    """
    raw = request.scope.get("raw_path") or quote(request.scope["path"]).encode()
    said = raw.decode("latin-1").partition("/userdata/")[2]
    file, moved, other = said.partition("/move/") if request.method == "POST" else (said, "", "")
    return unquote(file), unquote(other) if moved else None


async def _served(request: Request) -> Served:
    """What prompts may name."""
    comfy: Comfy = request.app.state.comfy
    return await comfy.served(until(request))


async def _json(request: Request) -> Any:
    return await bodies.understood(bodies.decode_loosely, await bodies.read(request, "text/plain"), until(request))


def _archive(request: Request) -> Archive:
    found: Archive = request.app.state.comfy.archive
    return found
