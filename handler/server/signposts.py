"""Where a request should have gone that came to no route, and what stands at the root."""

import difflib
from collections.abc import Sequence

from handler.server.mounted import EDITOR

V1 = "/v1"
ELSEWHERE = ("chat", "completions", "responses", "embeddings", "audio", "videos")  # OpenAI's other routes begin so
WELCOME = """Kindling serves {model}, which makes pictures from text.

POST /v1/images/generations   OpenAI's Images API
POST /v1/images/edits         its edits of images
POST /generate                all that can be asked, and told
POST /                        Hugging Face's InferenceClient
POST /fal/MODEL               fal's clients
POST /prompt                  ComfyUI's graphs, and its other routes
PUT  /workflows/NAME          a ComfyUI workflow as an endpoint
{editor}GET  /v1/models               what is served here
GET  /openapi.json            all routes and fields

The base URL for OpenAI's clients is this address with /v1 at its end.
"""

PAGE = "GET  /comfy/                  ComfyUI's editor, in a browser\n"


def lost(path: str, routes: Sequence[str], root: str = "") -> str:
    """What to say of a `path` that is none of `routes`. Both begin at the app's root, which is `root` to callers."""
    told = f"There is no route {root + path:.80}."
    bare = path.rstrip("/")
    if path in routes:
        return f"{root}{path} is a websocket, which this request does not open."
    if f"{V1}{bare}" in routes:
        return f"{told} Did you mean {root}{V1}{bare}? The client's base URL should end with {V1}."
    if bare.startswith(V1 * 2) and bare.removeprefix(V1) in routes:
        return f"{told} Did you mean {root}{bare.removeprefix(V1)}? The client's base URL should have {V1} once."
    if bare.removeprefix(V1).strip("/").partition("/")[0] in ELSEWHERE:
        return f"{told} This worker serves images: POST {root}/v1/images/generations."
    if f"{bare}/".startswith(f"{EDITOR}/") and EDITOR not in routes:
        return f"{told} ComfyUI's editor is served with KINDLING_COMFY_UI=on, and its routes are at {root or '/'}."
    near = [bare] if bare in routes else difflib.get_close_matches(bare[:80], routes, 1, 0.8)
    return (
        f"{told} Did you mean {root}{near[0]}?"
        if near
        else f"{told} GET {root}/openapi.json describes those there are."
    )
