"""Pictures by URL that this worker serves itself: whoever has the URL may have the picture, as a presigned one."""

from starlette.requests import Request
from starlette.responses import Response

from handler.api.links import Content, Links
from handler.api.reply import Reply, answered
from handler.server.access import response


async def content(request: Request) -> Response:
    """A picture, for as long as its URL works."""
    links: Links = request.app.state.api.links
    found: Content | Reply = await answered(links.content(request.path_params["image_id"]))
    if isinstance(found, Reply):
        return response(request.scope, found)
    headers = {
        "cache-control": f"private, max-age={found.left_s}, immutable",
        "content-disposition": f'inline; filename="image.{found.media.removeprefix("image/")}"',
    }
    return Response(found.data, headers=headers, media_type=found.media)
