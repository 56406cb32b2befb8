"""The description at /openapi.json: complete, by the route table; true, by schemathesis against a live server."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
import torch
from jsonschema_rs import Draft202012Validator
from pydantic import TypeAdapter, ValidationError
from schemathesis_hooks import picture

from comfy_graphs import graph
from fakes import Editor
from handler import MODELS, Api, Engine, Settings, create_app
from handler.core.errors import KindlingError
from handler.core.request import MAX_SIDE, MIN_SIDE
from handler.core.stepcache import StepCacheSetting
from handler.server import app, idempotency
from handler.server.openapi import comfy, deployments, workflows
from handler.server.openapi.document import Description, document
from handler.server.openapi.operation import JSON
from handler.server.openapi.operations import OPERATIONS, every, operations
from handler.server.openapi.requests import SIDE, requests
from handler.server.openapi.responses import ANSWERS, types
from loras import put
from serving import live

ST = Path(sys.executable).with_name("st")
KEY = "the-key"


CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"] # 504 is what a deadline asks for
"""
FIXED = """
[[operations]] # nothing can be put there, nor taken from there, for it comes with the image
include-path = "/workflows/poster"
include-method = ["PUT", "DELETE"]
enabled = false
"""


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The address of a live server whose pictures cost nothing."""
    with live(create_app(Engine(settings, boot=Editor().boot), public=False)) as url:
        yield url


STRICT = "positive_data_acceptance,negative_data_rejection"  # checks of a description that says all
LOOSE = (*comfy.OPERATIONS, *deployments.OPERATIONS, workflows.LIST, workflows.ONE)


@pytest.mark.parametrize(
    ("settings", "loose"),
    [
        (Settings(api_keys=(KEY,)), False),
        (Settings(api_keys=(KEY,)), True),
        (Settings(model="sd3.5-large"), False),
        (Settings(model="flux2-klein"), False),
    ],
    ids=["spark", "ComfyUI's routes and workflows", "sd3.5-large", "flux2-klein"],
)
def test_schemathesis_finds_nothing(
    settings: Settings, loose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its checks, in all its phases: examples, coverage, fuzzing, stateful.

    Of another model than spark, the routes that take something else, and of what they take the fields that differ: the
    others are what they are there.
    ComfyUI's routes, and what workflows may be, are described in short: for them, all but two, and fuzzing alone. Where
    one is kept it may be named as the model, and what it takes then is in its own operation.
    """
    # It sends one idempotency key with body after body, which is refused, as tests/server/test_repeats.py has it.
    monkeypatch.setattr(app, "key_of", lambda headers: idempotency.key_of(headers) and None)
    key = ["--header", f"Authorization: Bearer {KEY}"] if settings.api_keys else []
    bounds = [
        "--seed",
        "1",
        "--max-examples",
        "3" if loose else "15",
        "--workers",
        "1",
        "--generation-database",
        "none",
    ]
    quiet = ["--no-color", "--warnings", "off"]  # it would warn of the retired route, which is never found
    less = ["--exclude-checks", STRICT, "--phases", "fuzzing", "--max-examples", "5"] if loose else []
    (tmp_path / "schemathesis.toml").write_text(CONFIG + FIXED)
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": path}
    (tmp_path / "image").mkdir()
    (tmp_path / "image/poster.json").write_text(json.dumps(graph()))  # for spark
    kept = {"volume": tmp_path / "volume"} | ({"workflows": tmp_path / "image"} if loose else {})
    with served(settings.model_copy(update=kept)) as url:
        told = httpx.get(f"{url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
        if settings.model != "spark":
            mine, sparks = taken(told), taken(described())
            told["paths"] = {path: each for path, each in told["paths"].items() if mine.get(path) != sparks.get(path)}
            for route in ("/generate", "/v1/images/generations", "/v1/images/edits", "/fal/{id}"):
                body, spark = (one[route][1]["content"][JSON]["schema"] for one in (mine, sparks))
                told["paths"][route]["post"]["requestBody"]["content"][JSON]["schema"] = differing(body, spark)
        # Of fields that depend on one another it makes no forms with files; below is one.
        del told["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
        told["paths"] = {path: each for path, each in told["paths"].items() if (path in LOOSE) == loose}
        (tmp_path / "openapi.json").write_text(json.dumps(told))
        found = subprocess.run(
            [ST, "run", "openapi.json", "--url", url, "--checks", "all", *quiet, *bounds, *less, *key],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert found.returncode == 0, found.stdout[-10_000:] + found.stderr
    assert "No issues found" in found.stdout


def taken(found: dict[str, Any]) -> dict[str, Any]:
    """What each path of a description says, and the body that it takes, with all that is in it."""
    known = found["components"]["schemas"]
    bodies = {path: each.get("post", {}).get("requestBody") for path, each in found["paths"].items()}
    return {path: (found["paths"][path], resolved(body, known)) for path, body in bodies.items()}


def differing(body: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of a body the fields that are not as in `other`, those in rules that are not there, and what it must have."""
    rules, others = (each["dependentSchemas"]["prompt"]["allOf"] for each in (body, other))
    named = json.dumps([rule for rule in rules if rule not in others] + ["prompt", "image", "images"])
    fields = body["properties"].items()
    kept = {name: each for name, each in fields if each != other["properties"].get(name) or f'"{name}"' in named}
    assert 3 < len(kept) < len(fields) / 2
    return body | {"properties": kept}


def described(**settings: Any) -> dict[str, Any]:
    engine = Engine(Settings(**settings))
    return document(engine, Api(engine).names())


@pytest.mark.parametrize("model", MODELS)
def test_it_is_openapi_for_every_model(model: str) -> None:
    schemathesis.openapi.from_dict(described(model=model)).validate()


@pytest.mark.parametrize("model", MODELS)
def test_no_body_has_more_rules_than_schemathesis_can_follow(model: str) -> None:
    known = requests(MODELS[model], Settings(model=model), [model])
    for name, schema in known.items():
        told = resolved(schema, known)
        found = jsonschema_rs.canonicalize(told, draft=jsonschema_rs.Draft202012, validate_formats=True)
        assert found.kind is not jsonschema_rs.canonical.CanonicalKind.RAW, name


def types_within(schema: Any) -> Iterator[dict[str, Any]]:
    """What a generator of clients looks at: the schemas in a schema, but for what only validators read."""
    for name, each in schema.items():
        if name in ("properties", "$defs"):
            yield from each.values()
        elif name in ("items", "additionalProperties") and isinstance(each, dict):
            yield each
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            yield from each


@pytest.mark.parametrize("model", ["spark", "flux-dev", "sd3.5-large", "flux2-klein", "sdxl"])
def test_generators_of_clients_find_plain_types_with_names(model: str) -> None:
    """What openapi-typescript, datamodel-codegen and others made of a description that did not keep to this:

    fields with a default had to be sent, rules about fields became unions of dozens of types, and types without names
    of their own were numbered. That theirs work is tried by `benchmarks/clients/attempt.py`.
    """
    found = described(model=model, step_cache="off")
    schemas = found["components"]["schemas"]
    assert not [name for name in schemas if name[-1].isdigit()]
    left = [each for schema in schemas.values() for each in types_within(schema)]
    while left:
        each = left.pop()
        assert not {"default", "allOf", "enum", "properties", "title"} & each.keys(), each
        assert "required" not in each, "a rule that is no type"
        left += types_within(each)
    for schema in schemas.values():
        assert not {"default", "allOf"} & schema.keys()
    requests_ = [schemas[name] for name in ("GenerationRequest", "NativeRequest")]
    assert all(schema["required"] == ["prompt"] for schema in requests_)
    stream = found["paths"]["/v1/images/generations"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    event = schemas[stream["schema"]["$ref"].rpartition("/")[2]]
    kinds = [each["$ref"].rpartition("/")[2] for each in event["oneOf"]]
    assert kinds == ["PartialImage", "Progress", "Completed", "Error"]
    assert schemas["Completed"]["properties"]["type"]["const"] == "image_generation.completed"
    for operations_ in found["paths"].values():
        for operation in operations_.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            inline = [media.get("schema", {}) for body in bodies for media in body.get("content", {}).values()]
            assert not [schema for schema in inline if "properties" in schema or "enum" in schema]
            for body in bodies:  # in TypeScript, unknown beside other types leaves nothing but unknown
                assert all(media["schema"] for media in body.get("content", {}).values() if JSON in body["content"])


def test_every_route_is_described_with_its_methods() -> None:
    made = create_app(Engine(Settings()), public=False)
    routes: dict[str, set[str]] = {}
    for route in made._routes:
        path = re.sub(r":\w+", "", route.path)
        routes[path] = routes.get(path, set()) | (route.methods or set()) - {"HEAD"}
    del routes["/playground/{name}"]  # what a browser loads with the page at /
    twins = {path for path in routes if path.removeprefix("/api") in routes.keys() - {path}}  # which ABOUT speaks of
    described_ = {path: {row.method.upper() for row in rows} for path, rows in operations().items()}
    assert {path: methods for path, methods in routes.items() if path not in twins} == described_


def test_no_two_types_have_one_name() -> None:
    parts = (
        requests(MODELS["spark"], Settings(), ["spark"]),
        types(),
        ANSWERS,
        workflows.ANSWERS,
        comfy.SHAPES,
        deployments.SHAPES,
    )
    names = [name for part in parts for name in part]
    assert len(names) == len({*names})


def test_a_report_is_described_as_it_is(tmp_path: Path) -> None:
    with served(Settings(volume=tmp_path)) as url:
        report = httpx.post(f"{url}/explain", json=graph(), timeout=60).json()
        found = httpx.get(f"{url}/openapi.json").json()
    Draft202012Validator({"$ref": "#/components/schemas/Explained", "components": found["components"]}).validate(report)


def test_every_error_is_described() -> None:
    found = described(api_keys=("a",))
    told = {code for answer in found["components"]["responses"].values() for code in re.findall(r"\w+", str(answer))}
    assert {each.code for each in every(KindlingError)} <= told
    assert not {"cancelled", "fetch_failed"} & told  # nobody is there any more to read it; no route fetches
    drawing = found["paths"]["/generate"]["post"]["responses"]
    assert {str(each.status) for each in every(KindlingError)} - {"403"} <= set(drawing)


def test_who_may_ask_is_described() -> None:
    keyed, open_ = described(api_keys=("a",)), described()
    assert keyed["security"] == [{"key": []}]
    assert "security" not in open_
    for found, has, has_not in ((keyed, "401", "403"), (open_, "403", "401")):
        statuses = found["paths"]["/v1/models"]["get"]["responses"].keys()
        assert has in statuses
        assert has_not not in statuses
        assert not {"401", "403"} & found["paths"]["/ping"]["get"]["responses"].keys()


def resolved(schema: Any, known: dict[str, Any]) -> Any:
    """`schema` with what it refers to in its place."""
    if isinstance(schema, list):
        return [resolved(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: resolved(each, known) for name, each in schema.items() if name != "$ref"}
    return found | (resolved(known[schema["$ref"].rpartition("/")[2]], known) if "$ref" in schema else {})


def field(name: str, **settings: Any) -> dict[str, Any]:
    """A request's field, as the worker with these settings describes it."""
    known = described(**settings)["components"]["schemas"]
    found = resolved(known["NativeRequest"]["properties"][name], known)
    return dict(found.get("anyOf", [found])[0])


def test_limits_are_those_of_the_model() -> None:
    assert field("num_inference_steps")["maximum"] == 8
    assert field("num_inference_steps", model="flux-dev")["maximum"] == 50
    assert field("scheduler", model="flux-dev")["enum"] == ["flow-match-euler", "dpm++", "euler"]
    assert (field("guidance_scale")["maximum"], field("guidance_scale")["multipleOf"]) == (1, 1)
    assert [field("images", model=model)["maxItems"] for model in ("spark", "flux2-dev")] == [1, 6]
    assert field("model", model="realtime")["enum"][-2:] == ["realtime", ""]
    assert field("step_cache", model="flux-dev")["enum"] == ["off"]
    assert field("response_format")["enum"] == ["b64_json", "url"]


@pytest.mark.parametrize(
    "value",
    ["off", "on", "Fn=1,R=0.24", {"W": 4, "R": 0.5}, {}, "", "never", "Fn", {"W": 0}, {"R": 1.5}, {"W": 1.5}, {"Z": 1}],
    ids=str,
)
def test_a_step_cache_is_described_as_it_is_read(value: object) -> None:
    validator = Draft202012Validator(field("step_cache", model="flux-dev", step_cache="on"))
    try:
        TypeAdapter(StepCacheSetting).validate_python(value)
        reads = True
    except ValidationError:
        reads = False
    assert validator.is_valid(value) == reads


def test_loras_are_described_as_they_are_found(tmp_path: Path) -> None:
    assert field("loras", volume=tmp_path)["maxItems"] == 0
    parts = {"x.lora_down.weight": torch.ones(1, 2), "x.lora_up.weight": torch.ones(2, 1)}
    put(tmp_path / "loras/styles/ink.safetensors", parts)
    validator = Draft202012Validator(field("loras", volume=tmp_path))
    apart = {"name": "styles/ink", "weight": -10, "clip_weight": 0.5}
    for good in ([], ["styles/ink"], [{"name": "styles/ink"}, apart]):
        assert validator.is_valid(good)
    for bad in (["ink"], [apart | {"clip_weight": 11}], [{"weight": 1}], ["styles/ink"] * 5, "styles/ink"):
        assert not validator.is_valid(bad)


def test_the_pattern_of_a_side_is_its_bounds() -> None:
    fitting = [side for side in range(10_000) if re.fullmatch(SIDE, str(side))]
    assert fitting == list(range(MIN_SIDE, MAX_SIDE + 1))


def strict(schema: Any) -> Any:
    """`schema`, with objects that take no fields but those they name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema and "required" in schema else {}
    return {**closed, **{name: strict(each) for name, each in schema.items()}}


IMAGE = base64.b64encode(picture("PNG")).decode()
READ = [path for path, row in OPERATIONS.items() if 200 in row.answers and JSON in row.answers[200].content]


def default(field: dict[str, Any]) -> Any:
    """The one that its description tells; else an empty text, which counts as not sent."""
    told = re.search(r"Default: (.+)\.$", field.get("description", ""))
    return json.loads(told[1]) if told else ""


def test_a_form_is_described_as_it_is_read() -> None:
    """Every field that a form may have, with its default or what it may be, as text; files as files."""
    known = described()["components"]["schemas"]
    form = resolved(known["EditForm"], known)
    given = {"prompt": "x", "seed": 7, "strength": 0.5, "model": "spark", "size": "64x64", "n": 1}
    fields = {
        name: given.get(name, schema.get("enum", [default(schema)])[0])
        for name, schema in form["properties"].items()
        if name not in ("image", "mask")
    }
    files = [(name, ("a.png", picture("PNG"), "image/png")) for name in ("image", "mask")]
    with served(Settings()) as url:
        answer = httpx.post(f"{url}/v1/images/edits", data=fields, files=files, timeout=60)
        other = httpx.post(f"{url}/v1/images/edits", data=fields | {"other": "x"}, files=files, timeout=60)
    assert (answer.status_code, other.status_code) == (200, 400), answer.text
    assert answer.json()["data"][0]["seed"] == 7
    assert form["required"] == ["image", "prompt"]


@pytest.mark.parametrize("path", READ)
def test_no_answer_has_a_field_that_is_not_described(path: str) -> None:
    row = OPERATIONS[path]
    components = strict(described()["components"])
    asked = {"prompt": "x", "n": 2} | ({"image": IMAGE} if path.endswith("/edits") else {})
    with served(Settings()) as url:
        body = asked if row.body else None
        answer = httpx.request(row.method, url + path.replace("{id}", "spark"), json=body, timeout=60)
    assert answer.status_code == 200
    (schema,) = [each for kind, each in row.answers[200].content.items() if kind in answer.headers["content-type"]]
    Draft202012Validator({**schema, "components": components}).validate(answer.json())


def test_it_is_made_anew_where_what_it_depends_on_has_changed_and_else_once(tmp_path: Path) -> None:
    engine = Engine(Settings(volume=tmp_path))
    description = Description(engine, Api(engine).names())
    first = description.text("", [])
    assert json.loads(first) == json.loads(json.dumps(document(engine, Api(engine).names())))
    assert description.text("", []) is first
    below = description.text("/below", [])
    assert json.loads(below)["servers"] == [{"url": "/below"}]
    (tmp_path / "loras").mkdir()
    put(tmp_path / "loras" / "ink.safetensors", {"a.lora_A.weight": torch.zeros(1, 1)})
    with_lora = description.text("/below", [])
    assert b'"ink"' in with_lora
    assert with_lora != below
    assert description.text("/below", []) is with_lora
