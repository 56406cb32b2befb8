"""Deployments: their routes, and what these answer."""

from handler.api.deploying.asking import ROUTE, WORDS
from handler.api.deploying.platforms import PLATFORMS
from handler.catalog.cuda import BUILDS
from handler.catalog.models import MODELS
from handler.server.deployments import ONE
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.schema import COUNT, NULL, NUMBER, TEXT, Schema, array, ref, whole
from handler.server.patience import DEADLINE

TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
WORKERS = {"type": "integer", "minimum": 0, "maximum": 999_999_999}


def _query(schema: Schema, description: str) -> Schema:
    return {"in": "query", "schema": schema, "description": description}


PARAMETERS: dict[str, Schema] = {
    "platform": {
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": [*PLATFORMS]},
        "description": "Where to.",
    },
    "model": _query(TEXT, f"A model's id, alias or mode, such as {next(iter(MODELS))}; else the served one."),
    "gpu": _query(TEXT, "The platform's name of a GPU, or ours; else the cheapest that holds the model."),
    "precision": _query({"type": "string", "enum": [*WORDS]}, "How weights are kept."),
    "cuda": _query({"type": "string", "enum": [*BUILDS]}, "The image's build of torch."),
    "min": _query(WORKERS, "Workers that always run, and are paid for."),
    "max": _query(WORKERS, "Workers at most."),
    "region": _query(TEXT, "Where to run, by the platform's name; several with commas."),
}
SHAPES: dict[str, Schema] = {
    "Deployment": whole(
        {
            "platform": TEXT,
            "model": TEXT,
            "gpus": array(TEXT),
            "memory": TEXT | {"description": "What is on the GPU, with the arithmetic."},
            "cold_start": TEXT | {"description": "How long one takes, and what that rests on."},
            "price": TEXT,
            "licence": TEXT | {"description": "What using the model obliges you to."},
            "note": TEXT | {"description": "What to see to; empty where there is nothing."},
            "commands": array(TEXT),
            "files": TEXTS | {"description": "Texts by names of files, which the commands want."},
            "script": TEXT | {"description": "The commands as a shell script."},
        }
    ),
    "Deployments": whole(
        {
            "platforms": array(ref("DeploymentPlatform")),
            "models": array(whole({"id": TEXT, "license": TEXT, "obligation": TEXT})),
            "precisions": array(whole({"id": TEXT, "meaning": TEXT})),
        }
    ),
    "DeploymentPlatform": whole(
        {
            "id": TEXT,
            "gpus": array(whole({"id": TEXT, "memory_gb": NUMBER, "dollars_per_s": {"anyOf": [NUMBER, NULL]}})),
            "least": COUNT | {"description": "Workers that always run there, at least."},
            "one_region": {"type": "boolean", "description": "Whether it runs in one place only."},
            "lacks": TEXTS | {"description": "Fields that mean nothing there, and why."},
        }
    ),
}
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    ROUTE: (
        Operation(
            "get",
            "What a deployment can be chosen of",
            {200: Answer("Platforms, models and precisions.", {JSON: ref("Deployments")})},
        ),
    ),
    ONE: (
        Operation(
            "get",
            "The commands and files that deploy a model to a platform, and what to expect",
            {200: Answer("It can work.", {JSON: ref("Deployment")})},
            errors=(*ALWAYS, 400, 404, 422, 504),
            parameters=("x-request-id", "traceparent", DEADLINE, *PARAMETERS),
        ),
    ),
}
