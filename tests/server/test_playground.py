"""The playground over HTTP: who gets it, what its files say of themselves, and that it is open and holds no data."""

import asyncio
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from fakes import FakeFamily
from handler import MODELS, Engine, Settings, create_app
from handler.api import abilities
from handler.core.errors import RequestError
from handler.core.request import ImageRequest
from handler.server.playground import page

KEY = "canary-key-0451"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}
NAMES = sorted(name for name in page.assets() if name != "index.html")
LARGEST = 100_000  # bytes of all files together


@pytest.fixture
def app(family: FakeFamily) -> Iterator[Callable[..., Any]]:
    """Makes apps over the fake model."""
    engines = []

    def make(**settings: Any) -> Any:
        engines.append(family.engine(**settings))
        return create_app(engines[-1].__enter__(), public=False)

    yield make
    for engine in engines:
        engine.__exit__(None, None, None)


def ask(app: Any, path: str, method: str = "GET", root: str = "", **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("accept", "shown"),
    [
        (BROWSER["accept"], True),
        ("text/html", True),
        ("text/html;q=0.9, text/plain;q=0.1", True),
        ("*/*", False),
        ("text/html, text/plain", False),
        ("text/html;q=0.1, text/plain", False),
        ("text/html;q=0, */*", False),
        ("application/json", False),
        ("image/png", False),
        ("", False),
    ],
)
def test_browsers_get_the_page_and_others_the_text(app: Callable[..., Any], accept: str, shown: bool) -> None:
    answer = ask(app(), "/", headers={"accept": accept})
    assert answer.status_code == 200
    assert "accept" in answer.headers["vary"]
    assert answer.headers["content-type"] == f"text/{'html' if shown else 'plain'}; charset=utf-8"
    assert ("POST /v1/images/generations" in answer.text) is not shown


def test_the_page_runs_its_own_files_and_asks_its_own_server_alone(app: Callable[..., Any]) -> None:
    made = app()
    for path in ("/", *(f"/playground/{name}" for name in NAMES)):
        headers = ask(made, path, headers=BROWSER).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' blob: data:"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"


def test_there_is_no_script_or_style_in_the_page_and_no_other_host_in_any_file() -> None:
    files = {name: asset.data.decode() for name, asset in page.assets().items()}
    html = files["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    for name, text in files.items():
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text), name
        assert re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", text.replace("http://www.w3.org/2000/svg", "")) == []


def test_every_file_of_the_page_has_its_type(app: Callable[..., Any]) -> None:
    made, types = app(), {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert {"main.js", "app.js", "dom.js", "style.css", "icon.svg", "make.js"} <= {*NAMES}
    for name in NAMES:
        answer = ask(made, f"/playground/{name}")
        assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        assert answer.content == (page.ASSETS / name).read_bytes()
    html = ask(made, "/", headers=BROWSER).text
    for name in re.findall(r'(?:href|src)="(playground/[^"]+)"', html):
        assert ask(made, f"/{name}").status_code == 200, name


def test_what_a_browser_has_is_not_sent_again_and_all_is_packed(app: Callable[..., Any]) -> None:
    made = app()
    for path in ("/", "/playground/main.js"):
        first = ask(made, path, headers=BROWSER | {"accept-encoding": "identity"})
        tag = first.headers["etag"]
        again = ask(made, path, headers=BROWSER | {"if-none-match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        other = ask(made, path, headers=BROWSER | {"if-none-match": '"another"'})
        assert (other.status_code, other.text) == (200, first.text)
        packed = ask(made, path, headers=BROWSER | {"accept-encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.text == first.text
        assert int(packed.headers["content-length"]) < len(first.content)
        assert "accept-encoding" in packed.headers["vary"]


@pytest.mark.parametrize("refused", ["gzip;q=0", "br, gzip ; q=0.000", "identity, x-gzipped", ""])
def test_who_refuses_gzip_gets_none(app: Callable[..., Any], refused: str) -> None:
    made = app()
    for path in ("/", "/playground/main.js"):
        assert "content-encoding" not in ask(made, path, headers=BROWSER | {"accept-encoding": refused}).headers
        taken = ask(made, path, headers=BROWSER | {"accept-encoding": "br;q=0, GZIP;q=0.5"})
        assert taken.headers["content-encoding"] == "gzip"


def test_all_files_together_are_small() -> None:
    assets = page.assets().values()
    assert sum(len(asset.data) for asset in assets) < LARGEST
    assert all(gzip.decompress(asset.packed) == asset.data for asset in assets)


@pytest.mark.parametrize(
    "name", ["index.html", "", "..%2fpage.py", "../page.py", "%2e%2e/page.py", "main.js/", "MAIN.JS", "page.py", "%00"]
)
def test_no_other_file_is_shown(app: Callable[..., Any], name: str) -> None:
    assert ask(app(), f"/playground/{name}").status_code == 404


def test_the_page_is_open_and_all_that_it_asks_for_is_not(app: Callable[..., Any]) -> None:
    made = app(api_keys=(KEY,), comfy_ui=False)
    for method in ("GET", "HEAD"):
        for path in ("/", *(f"/playground/{name}" for name in NAMES)):
            answer = ask(made, path, method, headers=BROWSER)
            assert answer.status_code == 200, path
            assert "spark" not in answer.text.replace('"spark"', "").replace("spark: [", "")  # which model it serves
    assert ask(made, "/").status_code == 401  # a text that names the model
    assert ask(made, "/", headers={"accept": "text/html", "authorization": "Bearer bad"}).status_code == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        for path in ("/", "/playground/main.js"):
            assert ask(made, path, method, headers=BROWSER).status_code == 401, (method, path)
    for path in ("/playground", "/playgrounds/main.js", "/v1/models", "/v1/status", "/generate", "/v1/receipt"):
        answer = ask(made, path, headers=BROWSER)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_it_is_open_to_whoever_has_no_key_and_another_name_for_this_machine(app: Callable[..., Any]) -> None:
    """It holds nothing; what it then asks for is refused."""
    made = app()
    foreign = {"host": "rebound.example", "origin": "http://other.example"}
    assert ask(made, "/", headers=BROWSER | foreign).status_code == 200
    assert ask(made, "/v1/models", headers=foreign).status_code == 403


def test_head_says_what_get_says(app: Callable[..., Any]) -> None:
    made = app()
    for path in ("/", "/playground/style.css"):
        get, head = (ask(made, path, method, headers=BROWSER) for method in ("GET", "HEAD"))
        assert head.content == b""
        told = [name for name in get.headers if name not in ("x-request-id", "date")]
        assert {name: head.headers[name] for name in told} == {name: get.headers[name] for name in told}


@pytest.mark.parametrize("path", ["/images/", "/images/playground/main.js"])
def test_below_a_prefix_it_is_the_same(app: Callable[..., Any], path: str) -> None:
    made = app(api_keys=(KEY,))
    inner = path.removeprefix("/images")
    for outer, root, asked in (
        (Starlette(routes=[Mount("/images", made)]), "", path),  # mounted
        (made, "/images", path),  # behind a proxy that keeps the prefix
        (made, "/images", inner),  # and one that does not
    ):
        answer = ask(outer, asked, root=root, headers=BROWSER)
        assert answer.status_code == 200
        assert answer.content == ask(made, inner, headers=BROWSER).content
    assert b'href="/' not in ask(made, "/", headers=BROWSER).content  # it looks for its files beside itself


def test_without_a_slash_at_its_end_a_prefix_leads_to_the_one_with_it(app: Callable[..., Any]) -> None:
    answer = ask(app(api_keys=(KEY,)), "/images", root="/images", headers=BROWSER)
    assert (answer.status_code, answer.headers["location"]) == (308, "images/")


def test_it_is_there_before_the_model_is(family: FakeFamily) -> None:
    made = create_app(Engine(Settings(), boot=family.boot), public=False)
    assert ask(made, "/v1/status").json()["status"] == "starting"
    assert ask(made, "/", headers=BROWSER).status_code == 200
    told = ask(made, "/v1/models/spark").json()
    assert told["fields"]["num_inference_steps"]["maximum"] == MODELS["spark"].max_steps


@pytest.mark.parametrize("name", MODELS)
def test_a_field_is_refused_in_the_words_in_which_drawing_refuses_it(name: str) -> None:
    spec, settings = MODELS[name], Settings(model=name)
    for field, told in abilities.fields(spec, settings).items():
        if field not in abilities.TRIED:
            assert "refused" not in told
            continue
        guided = abilities.GUIDED if field == "negative_prompt" and spec.takes_guidance else {}
        request = ImageRequest(prompt="x", **abilities.TRIED[field], **guided)
        if "refused" not in told:
            spec.validate(request, settings.step_cache)
            continue
        with pytest.raises(RequestError) as caught:
            spec.validate(request, settings.step_cache)
        assert caught.value.message == told["refused"]
        assert caught.value.param == field


@pytest.mark.parametrize("name", MODELS)
def test_a_field_is_drawn_up_to_its_bounds_and_not_beyond(name: str) -> None:
    """But for n, whose bound is the worker's."""
    spec, settings = MODELS[name], Settings(model=name)
    beside: dict[str, Any] = {
        "width": {"height": spec.size[1]},
        "height": {"width": spec.size[0]},
        "strength": abilities.IMAGE,
    }

    def ask(field: str, value: float) -> None:
        sent = (b"",) * int(value) if field == "images" else value
        request = ImageRequest.parse({"prompt": "x", **beside.get(field, {}), field: sent})
        spec.validate(request, settings.step_cache)

    for field, told in abilities.fields(spec, settings).items():
        if field == "n" or "refused" in told:
            continue
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound in told:
                ask(field, told[bound])
            if bound in told and (field, bound) != ("images", "minimum"):  # no list has fewer than none
                with pytest.raises(RequestError):
                    ask(field, told[bound] + step * told.get("multiple", 1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("spark", [("realtime", "auto", 4, False), ("quality", "max", 8, False)]),
        ("flux-schnell", [("realtime", "auto", 4, False), ("quality", "max", 4, True)]),
        ("flux-dev", [("realtime", "low", 14, False), ("quality", "auto", 28, False)]),
    ],
)
def test_modes_are_words_for_quality(name: str, words: list[tuple[str, str, int, bool]]) -> None:
    found = abilities.modes(MODELS[name])
    assert [(mode["id"], mode["quality"], mode["steps"], "refused" in mode) for mode in found] == words
    for mode in found:
        drawn = MODELS[name].recipe(ImageRequest(prompt="x", quality=mode["quality"]))
        assert drawn.steps == mode["steps"]


def test_every_mode_has_a_word_for_quality_on_every_model() -> None:
    for spec in MODELS.values():
        first, *_ = abilities.modes(spec)
        assert "refused" not in first


def test_of_another_model_nothing_is_told(app: Callable[..., Any]) -> None:
    answer = ask(app(), "/v1/models/flux-dev")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_the_files_are_in_the_package() -> None:
    """Of which setuptools takes what is listed."""
    listed = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"server/playground/assets/*"' in listed
