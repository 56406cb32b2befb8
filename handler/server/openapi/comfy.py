"""ComfyUI's routes in short: what they are for. Their shapes are ComfyUI's, and each is below /api too."""

from handler.api.comfy.archive import FOLDERS
from handler.api.comfy.viewing import CHANNELS
from handler.server import bodies, multipart
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.schema import COUNT, TEXT, Schema, array, ref, whole
from handler.server.patience import DEADLINE

OBJECT: Schema = {"type": "object"}
NAMES = array(TEXT)
MASKED = (403, 404, 503)
SENT = (400, 408, 413, 415, 422, 429, 504)  # of a body that is no good
FILE: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
UPLOAD = whole(
    {"image": FILE, "type": {"enum": [*FOLDERS]}, "subfolder": TEXT, "overwrite": TEXT},
    *("type", "subfolder"),
    "overwrite",
)
PARAMETERS: dict[str, Schema] = {
    "prompt_id": {"in": "path", "required": True, "schema": TEXT, "description": "As the answer to a prompt says it."},
    "node_class": {"in": "path", "required": True, "schema": TEXT, "description": "A class of nodes."},
    "folder": {
        "in": "path",
        "required": True,
        "schema": TEXT,
        "description": "Of models, as /models names it; to draw, a model's name.",
    },
    "filename": {"in": "query", "schema": TEXT, "required": True, "description": "Of a file, without its folder."},
    "subfolder": {"in": "query", "schema": TEXT, "description": "Inside the folder."},
    "type": {"in": "query", "schema": {"enum": [*FOLDERS]}, "description": "The folder."},
    "preview": {"in": "query", "schema": TEXT, "description": "webp or jpeg, and a quality: webp;90."},
    "channel": {"in": "query", "schema": {"enum": [*CHANNELS]}, "description": "Which of a picture's."},
    "max_items": {"in": "query", "schema": COUNT | {"minimum": 0}, "description": "How many, at most."},
    "offset": {"in": "query", "schema": COUNT | {"minimum": 0}, "description": "How many to pass over."},
    "limit": {"in": "query", "schema": COUNT | {"minimum": 1}, "description": "How many, at most."},
    "status": {"in": "query", "schema": TEXT, "description": "In which states, with commas between them."},
    "sort_order": {"in": "query", "schema": {"enum": ["asc", "desc"]}, "description": "By age; desc is newest first."},
}
HEAD = ("x-request-id", "traceparent")


def _get(summary: str, answer: Schema, *parameters: str, errors: tuple[int, ...] = (504,)) -> Operation:
    """What only tells."""
    said = {200: Answer("As it is now.", {JSON: answer})}
    return Operation("get", f"ComfyUI: {summary}", said, errors=(*ALWAYS, *errors), parameters=(*HEAD, *parameters))


def _waited(summary: str, answer: Schema, *parameters: str, errors: tuple[int, ...] = ()) -> Operation:
    """What only tells, of a volume or a GPU that may not answer; who asks says how long that is waited for."""
    return _get(summary, answer, *parameters, DEADLINE, errors=(400, *errors, 504))


def _post(summary: str, body: Schema, answer: Schema | None = None, *errors: int, media: str = JSON) -> Operation:
    """What does something; where nothing is to be said of that, the answer is empty."""
    said = {200: Answer("Done.", {JSON: answer} if answer else {})}
    refusals = tuple(dict.fromkeys((*ALWAYS, *SENT, *errors)))
    return Operation(
        "post", f"ComfyUI: {summary}", said, {media: body}, refusals, (*HEAD, DEADLINE), optional=media == JSON
    )


def _explained() -> Operation:
    """Any file that has a graph."""
    graph = dict.fromkeys(bodies.GRAPHS, FILE) | {JSON: OBJECT}
    errors = tuple(dict.fromkeys((*ALWAYS, *SENT)))
    answers = {200: Answer("The report, whatever its verdict.", {JSON: ref("Explained")})}
    return Operation("post", "ComfyUI: explain a graph before it is drawn", answers, graph, errors, (*HEAD, DEADLINE))


SHAPES: dict[str, Schema] = {
    "ComfyPrompt": whole(
        {"prompt": OBJECT, "client_id": TEXT, "prompt_id": TEXT, "extra_data": OBJECT},
        *("client_id", "prompt_id", "extra_data"),
    ),
    "ComfyAccepted": whole({"prompt_id": TEXT, "number": {"type": "number"}, "node_errors": OBJECT}),
    "ComfyForget": whole({"clear": {"type": "boolean"}, "delete": NAMES}, "clear", "delete"),
    "ComfyInterrupt": whole({"prompt_id": TEXT}, "prompt_id"),
    "ComfyCancel": whole({"job_ids": NAMES}),
    "ComfyCancelled": whole({"cancelled": {"type": "boolean"}}),
    "ComfyUpload": UPLOAD,
}
VIEWED = ("filename", "subfolder", "type", "preview", "channel")
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "/prompt": (
        _get("how much waits", OBJECT, errors=()),
        _post("draw a graph", ref("ComfyPrompt"), ref("ComfyAccepted"), 429, 503),
    ),
    "/explain": (_explained(),),
    "/queue": (
        _get("what waits and what is drawn", OBJECT, errors=()),
        _post("take prompts from the queue", ref("ComfyForget")),
    ),
    "/history": (
        _get("prompts that have ended", OBJECT, "max_items", "offset", errors=(400, 504)),
        _post("forget prompts", ref("ComfyForget")),
    ),
    "/history/{prompt_id}": (_get("one prompt, once it has ended", OBJECT, "prompt_id"),),
    "/view": (
        Operation(
            "get",
            "ComfyUI: one file",
            {
                200: Answer(
                    "The file.",
                    {"image/*": {}, "text/plain": {}, "application/octet-stream": {}},
                    ("content-disposition",),
                )
            },
            errors=(*ALWAYS, 400, 403, 404, 422, 504),
            parameters=(*HEAD, *VIEWED),
        ),
    ),
    "/upload/image": (_post("send an image", ref("ComfyUpload"), OBJECT, 403, 503, media=multipart.MEDIA),),
    "/upload/mask": (_post("send a mask for an image", ref("ComfyUpload"), OBJECT, *MASKED, media=multipart.MEDIA),),
    "/interrupt": (_post("stop what is drawn, or one prompt", ref("ComfyInterrupt")),),
    "/free": (_post("nothing: the model stays warm", OBJECT),),
    "/system_stats": (_waited("the machine", OBJECT),),
    "/object_info": (_waited("all classes of nodes", OBJECT),),
    "/object_info/{node_class}": (_waited("one class of nodes", OBJECT, "node_class"),),
    "/models": (_waited("folders of models", NAMES),),
    "/models/{folder}": (_waited("models in a folder", NAMES, "folder", errors=(404,)),),
    "/embeddings": (_waited("embeddings", NAMES),),
    "/features": (_get("what clients may count on", OBJECT, errors=()),),
    "/api/jobs": (_get("prompts in any state", OBJECT, "status", "limit", "offset", "sort_order", errors=(400, 504)),),
    "/api/jobs/cancel": (_post("stop prompts", ref("ComfyCancel"), ref("ComfyCancelled")),),
    "/api/jobs/{prompt_id}": (_get("one prompt, in any state", OBJECT, "prompt_id", errors=(404, 504)),),
    "/api/jobs/{prompt_id}/cancel": (
        Operation(
            "post",
            "ComfyUI: stop one prompt",
            {200: Answer("Whether.", {JSON: ref("ComfyCancelled")})},
            parameters=(*HEAD, "prompt_id"),
        ),
    ),
}
