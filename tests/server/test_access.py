"""Who may ask: keys on every route, other origins' pages, what is refused unread, and the head of every answer."""

import asyncio
import base64
import contextlib
import gzip
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Scope

from fakes import FakeFamily, raises
from handler import Settings, create_app
from handler.core.errors import NumericalError, SettingsError
from handler.core.loopback import is_loopback
from handler.server import auth, keys, refusals
from handler.server.auth import DEFAULTS, OPEN_ROUTES, Head
from handler.server.keys import ADMIN, Keys, weak
from handler.server.metrics import Metrics
from serving import Served, live, serving

KEY, OTHER = "canary-key-0451", "canary-key-0452"
ROUTE, PAGE = "/v1/images/generations", "https://page.example"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "BREW")
PICTURE = "/v1/images/spark/content"
ASSET = "/playground/spark"
STRANGERS = {
    "no key": {},
    "wrong key": {"authorization": "Bearer canary-key-0453"},
    "shorter": {"authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"authorization": f"Bearer {KEY}1"},
    "both": {"authorization": f"Bearer {KEY},{OTHER}"},
    "empty": {"authorization": "Bearer "},
    "bare": {"authorization": KEY},
    "basic": {"authorization": f"Basic {KEY}"},
    "another header": {"x-key": KEY},
    "a header of ours": {"x-api-key": f"{KEY}x"},
    "a password": {"authorization": "Basic " + base64.b64encode(f"{KEY}:x".encode()).decode()},
    "much longer": {"authorization": "Bearer " + "k" * 10_000},
    "not ASCII": {"authorization": "Bearer kéy"},
}


@pytest.fixture
def app(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes an app with the settings given, over an engine that is ready; its refusals leave without a pause."""
    monkeypatch.setattr(refusals, "RATE", math.inf)
    with contextlib.ExitStack() as stack:
        yield lambda **settings: create_app(stack.enter_context(family.engine(**settings)), public=False)


@contextlib.contextmanager
def asking(app: ASGIApp) -> Iterator[Callable[..., httpx.Response]]:
    """Asks, one after another; of a server's crash its answer, as the other side of the wire has it."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=transport, base_url="http://kindling")

        def one(method: str = "POST", path: str = ROUTE, **options: Any) -> httpx.Response:
            headers = httpx.Headers(options.pop("headers", {}), encoding="utf-8")
            return runner.run(client.request(method, path, headers=headers, **options))

        yield one
        runner.run(client.aclose())


def ask(app: ASGIApp, method: str = "POST", path: str = ROUTE, **options: Any) -> httpx.Response:
    """One request."""
    with asking(app) as one:
        return one(method, path, **options)


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def paths(app: Any) -> list[str]:
    """Every route's, with something in the place of what is variable."""
    return [re.sub(r"\{\w+(:\w+)?\}", "spark", route.path) for route in app._routes]


@pytest.mark.parametrize("who", STRANGERS)
def test_every_route_asks_for_a_key(app: Callable[..., Any], family: FakeFamily, who: str) -> None:
    made = app(api_keys=(KEY, OTHER))
    assert len(paths(made)) >= 10
    assert OPEN_ROUTES == ("/ping", "/health", "/health/live")
    with asking(made) as one:
        for path, method in itertools.product([*paths(made), "/nowhere", "/", "/docs"], METHODS):
            answer = one(method, path, headers=STRANGERS[who])
            if path in OPEN_ROUTES:
                assert answer.status_code in (200, 405)
                continue
            if path == ASSET and method in ("GET", "HEAD"):  # of the playground, whose files are open; this is none
                assert answer.status_code == 404
                continue
            if path == PICTURE and method in ("GET", "HEAD"):  # its id is its key, and this is none
                assert answer.status_code == 404
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or code(answer) == "invalid_api_key"
    assert family.drawn == []


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_every_route_opens_to_a_known_key(app: Callable[..., Any], key: str) -> None:
    made = app(api_keys=(KEY, OTHER))
    with asking(made) as one:
        for path, method in itertools.product(paths(made), METHODS):
            answer = one(method, path, json={"prompt": "x"}, headers={"authorization": f"bearer  {key}"})
            assert answer.status_code not in (401, 403)
            assert (answer.status_code == 405) == ("allow" in answer.headers)


@pytest.mark.parametrize(
    "path", ["/ping/", "//ping", "/ping/../metrics", "/PING", "/ping%2f", "/health/live/x", "/ping;", "", "/ping\n"]
)
def test_nothing_beside_an_open_route_is_open(app: Callable[..., Any], path: str) -> None:
    made = app(api_keys=(KEY,))
    assert spoken(made, {"path": path, "method": "GET"})[0]["status"] == 401


def spoken(app: ASGIApp, scope: dict[str, Any], *said: dict[str, Any]) -> list[Any]:
    """What an app sends, told `said`; hearing it out is an error."""
    heard: list[Message] = []
    saying = iter(said)

    async def receive() -> Message:
        try:
            return next(saying)
        except StopIteration:
            raise AssertionError("asked for more") from None

    async def send(message: Message) -> None:
        heard.append(dict(message))

    whole: Scope = {"type": "http", "query_string": b"", "headers": [], "server": ("203.0.113.1", 80), **scope}
    asyncio.run(app(whole, receive, send))
    return heard


def test_a_websocket_needs_a_key_before_there_is_one(app: Callable[..., Any]) -> None:
    scope = {"type": "websocket", "path": "/ws", "subprotocols": []}
    assert spoken(app(api_keys=(KEY,)), scope) == [{"type": "websocket.close", "code": 1008}]
    foreign = scope | {"headers": [(b"origin", PAGE.encode()), (b"host", b"kindling")]}
    assert spoken(app(), foreign) == [{"type": "websocket.close", "code": 1008}]


def test_a_key_may_have_any_bytes_that_the_environment_has() -> None:
    scope: Scope = {"path": ROUTE, "headers": [(b"authorization", b"Bearer \xff\xc3\xa9")]}
    assert Keys(("\udcffé",))(scope) is None
    assert Keys(("\udcfe",))(scope) is not None


def test_keys_are_kept_as_digests_only(app: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = Settings(api_keys=(KEY,))
    known = Keys(settings.api_keys)
    assert "canary" not in f"{settings} {settings!r} {known!r} {vars(known)}"
    made = app(api_keys=(KEY,))
    for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"Basic {KEY}"}):
        for body in ({"prompt": "x"}, {"colour": "x"}):
            assert "canary" not in ask(made, json=body, headers=headers).text
    assert "canary" not in caplog.text


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    known = Keys((KEY, OTHER, "third"))
    assert known({"path": ROUTE, "headers": [(b"authorization", f"Bearer {KEY}".encode())]}) is None
    assert len(compared) == 3  # whether the first fits or not
    assert {len(each) for pair in compared for each in pair} == {32}


PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def test_without_the_setting_no_page_may_ask(app: Callable[..., Any]) -> None:
    made = app(api_keys=(KEY,))
    answers = [
        ask(made, "OPTIONS", headers=PREFLIGHT),
        ask(made, headers={"origin": PAGE, "authorization": f"Bearer {KEY}"}, json={"prompt": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [401, 200]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [f"http://localhost:3000, {PAGE}", "*"])
def test_pages_of_allowed_origins_may_ask_and_read_errors(
    app: Callable[..., Any], family: FakeFamily, origins: str
) -> None:
    made = app(api_keys=(KEY,), cors_origins=origins)
    preflight = ask(made, "OPTIONS", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    assert "access-control-allow-private-network" not in preflight.headers
    inwards = ask(made, "OPTIONS", headers=PREFLIGHT | {"access-control-request-private-network": "true"})
    assert (inwards.status_code, inwards.headers["access-control-allow-private-network"]) == (200, "true")
    family.at_step = {2: raises(NumericalError("NaN."))}
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    answers = {
        200: ask(made, headers=headers, json={"prompt": "x", "num_inference_steps": 1}),
        400: ask(made, headers=headers, json={"prompt": 1}),
        401: ask(made, headers={"origin": PAGE}, json={"prompt": "x"}),
        404: ask(made, "GET", "/nowhere", headers=headers),
        405: ask(made, "GET", headers=headers),
        415: ask(made, headers=headers | {"content-type": "text/plain"}, content=b"{}"),
        500: ask(made, headers=headers, json={"prompt": "x"}),
    }
    assert {answer.status_code for answer in answers.values()} == answers.keys()
    for answer in (*answers.values(), preflight):
        assert answer.headers["access-control-allow-origin"] == ("*" if origins == "*" else PAGE)
        assert "access-control-allow-credentials" not in answer.headers
    assert "x-request-id" in answers[401].headers["access-control-expose-headers"]


def test_caches_are_told_that_pages_of_others_get_another_answer(app: Callable[..., Any]) -> None:
    """Also of what is asked without an origin, as a picture in a page is, which a script of it then wants to read."""
    made = app(cors_origins=PAGE)
    for headers in ({}, {"origin": PAGE}):
        assert "origin" in ask(made, "GET", "/ping", headers=headers).headers["vary"].lower()


def test_pages_of_other_origins_may_not(app: Callable[..., Any]) -> None:
    made = app(api_keys=(KEY,), cors_origins=PAGE)
    for origin in ("https://page.example.evil", "http://page.example", "https://PAGE.example", "null"):
        preflight = ask(made, "OPTIONS", headers=PREFLIGHT | {"origin": origin})
        answer = ask(made, headers={"origin": origin, "authorization": f"Bearer {KEY}"}, json={"prompt": "x"})
        assert (preflight.status_code, answer.status_code) == (401, 200)
        assert "access-control-allow-origin" not in {**preflight.headers, **answer.headers}


@pytest.mark.parametrize("origins", ["page.example", "https://page.example/", "https://page.example/app", "https://*"])
def test_an_origin_that_is_none_is_named(origins: str) -> None:
    with pytest.raises(SettingsError, match=r"KINDLING_CORS_ORIGINS: .*without a path"):
        Settings.from_env({"KINDLING_CORS_ORIGINS": origins})


@pytest.mark.parametrize(
    ("origin", "settings", "status"),
    [
        (None, {}, 200),
        ("http://kindling", {}, 200),  # its own pages'
        (PAGE, {}, 403),
        ("null", {}, 403),
        ("http://kindling.evil", {}, 403),
        (PAGE, {"allow_open": True}, 403),
        (PAGE, {"cors_origins": PAGE}, 200),
        (PAGE, {"cors_origins": "*"}, 200),
        (PAGE, {"public_url": f"{PAGE}/kindling"}, 200),  # its own, behind a proxy that says another Host
    ],
)
def test_without_keys_other_pages_cannot_spend_the_gpu(
    app: Callable[..., Any], family: FakeFamily, origin: str | None, settings: dict[str, Any], status: int
) -> None:
    """What a page can send without asking first: a form's type, or none."""
    made = app(**settings)
    answer = ask(made, headers={"origin": origin} if origin else {}, content=b'{"prompt": "x"}')
    assert (answer.status_code, len(family.drawn)) == (status, status == 200)
    assert status == 200 or code(answer) == "foreign_origin"
    assert ask(made, "GET", "/ping", headers={"origin": PAGE}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("evil.example:8000", 403),
     ("127.0.0.1.evil.example", 403), ("[evil", 403), ("192.168.1.2", 403)],
)  # fmt: skip
def test_without_keys_a_loopback_server_answers_to_its_own_name(server: Served, host: str, status: int) -> None:
    """For a stranger's name can be made to lead here, and its page is then of the same origin."""
    answer = httpx.get(server.url + "/v1/models", headers={"host": host, "origin": f"http://{host}"})
    assert answer.status_code == status
    assert status == 200 or (code(answer), "KINDLING_API_KEYS" in answer.text) == ("foreign_origin", True)
    assert httpx.get(server.url + "/ping", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("environ", [{"KINDLING_ALLOW_OPEN": "true"}, {"KINDLING_API_KEYS": KEY}])
def test_with_keys_or_open_to_all_it_answers_to_any_name(environ: dict[str, str]) -> None:
    headers = {"host": "kindling.example", "authorization": f"Bearer {KEY}"}
    with serving(environ, ready=False) as server:
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200
        assert "canary" not in "".join(server.lines)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
        ({"content-type": "application/x-www-form-urlencoded"}, 200),  # curl -d without -H
        ({"content-encoding": "identity"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "deflate, gzip", "content-type": "application/json"}, 415),
    ],
)
def test_bodies_are_plain_json(app: Callable[..., Any], headers: dict[str, str], status: int) -> None:
    answer = ask(app(), headers=headers, content=b'{"prompt": "x"}')
    assert answer.status_code == status
    assert status == 200 or code(answer) == "unsupported_media_type"


def test_what_must_be_refused_is_refused_unread(app: Callable[..., Any]) -> None:
    made = app(max_body_mb=1)
    bomb = gzip.compress(b" " * 10_000_000)
    cases: list[tuple[dict[str, str], list[bytes], int]] = [
        ({"content-length": "1000001"}, [], 413),
        ({"content-length": str(len(bomb)), "content-encoding": "gzip"}, [], 415),
        ({"content-type": "text/plain"}, [], 415),
        ({}, [b" " * 600_000] * 2, 413),  # of a body of unknown length as much as it takes, no more
    ]
    for given, chunks, status in cases:
        headers = [(name.encode(), value.encode()) for name, value in given.items()]
        said = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        head, _ = spoken(made, {"path": ROUTE, "method": "POST", "headers": headers}, *said)
        assert head["status"] == status


def test_whole_numbers_may_have_a_point(app: Callable[..., Any], family: FakeFamily) -> None:
    made = app()
    assert ask(made, content=b'{"prompt": "x", "seed": 7.0, "n": 2e0}').status_code == 200
    assert family.drawn == [7, 8]
    assert ask(made, content=b'{"prompt": "x", "seed": 7.5}').status_code == 400


def test_every_answer_has_the_security_headers(app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Metrics) -> bytes:
        raise RuntimeError("a bug, with secrets in its text")

    monkeypatch.setattr(Metrics, "text", broken)
    made = app(cors_origins=PAGE)
    every = itertools.product(METHODS, [*paths(made), "/nowhere"])
    with asking(made) as one:
        answers = [
            one("OPTIONS", headers=PREFLIGHT),
            one(headers={"origin": "https://evil.example"}),
            one("GET", "/metrics"),
            one(json={"prompt": "x", "stream": True}),
            *(one(method, path, json={"prompt": "x"}) for method, path in every),
        ]
    for answer in answers:
        assert {name: answer.headers[name] for name in DEFAULTS} == DEFAULTS
        assert answer.headers["x-request-id"]
        assert "access-control-allow-origin" in answer.headers or answer is not answers[0]
    assert (answers[2].status_code, code(answers[2])) == (500, "internal_error")
    assert "secrets" not in answers[2].text


def test_a_page_may_have_a_policy_of_its_own() -> None:
    own = {"content-security-policy": "default-src 'self'"}
    answer = ask(Head(HTMLResponse("<p>", headers=own)), "GET", "/")
    assert {name: answer.headers[name] for name in DEFAULTS} == DEFAULTS | own


@pytest.mark.parametrize(
    ("host", "name", "own"),
    [
        ("localhost:1", "localhost", True), ("LocalHost", "LocalHost", True), ("127.0.0.1:80", "127.0.0.1", True),
        ("127.9.9.9", "127.9.9.9", True), ("[::1]:8000", "::1", True), ("[::1]", "::1", True), ("[evil", "", False),
        ("127.0.0.1:80@evil.example", "", False), ("localhost:x", "", False), ("localhost:1:2", "", False),
        ("localhost evil", "", False), ("local_host.a-b:1", "local_host.a-b", False),

        ("[fe80::1]:1", "fe80::1", False), ("evil.example:8000", "evil.example", False),
        ("10.0.0.1", "10.0.0.1", False), ("localhost.evil:1", "localhost.evil", False), ("", "", False),
    ],
)  # fmt: skip
def test_which_names_are_this_machines_own(host: str, name: str, own: bool) -> None:
    assert (auth._name(host), is_loopback(name)) == (name, own)


@pytest.mark.parametrize(
    ("settings", "here", "host", "lets"),
    [
        ({}, "127.0.0.1", "evil.example:1", False), ({}, "127.0.0.1", "localhost:1", True), ({}, "::1", "[::1]", True),
        ({}, "127.0.0.1", "", True), ({}, "203.0.113.1", "kindling.example", True), ({}, None, "evil.example", True),
        ({"allow_open": True}, "127.0.0.1", "evil.example", True),
        ({"cors_origins": (PAGE,)}, "127.0.0.1", "evil.example", False),
        ({}, "127.0.0.1", "127.0.0.1:80@evil.example", False), ({}, "127.0.0.1", "localhost:evil", False),
        ({"hosts": "kindling.lan"}, "127.0.0.1", "Kindling.LAN:8000", True),
        ({"hosts": "kindling.lan:8000"}, "127.0.0.1", "kindling.lan:8000", True),
        ({"hosts": "kindling.lan:8000"}, "127.0.0.1", "kindling.lan:1", False),
        ({"hosts": "kindling.lan", "allow_open": True}, "10.0.0.5", "kindling.lan:8000", True),
        ({"hosts": "kindling.lan", "allow_open": True}, "10.0.0.5", "evil.example", False),
        ({"hosts": "kindling.lan", "allow_open": True}, "10.0.0.5", "localhost:8000", True),
        ({"allow_open": True}, "10.0.0.5", "no name", False),
    ],
)  # fmt: skip
def test_without_keys_who_came_to_this_machine_asked_for_it(
    settings: dict[str, Any], here: str | None, host: str, lets: bool
) -> None:
    headers = [(b"host", host.encode())] if host else []
    scope: Scope = {"type": "http", "path": ROUTE, "headers": headers, "server": (here, 80) if here else None}
    refusal = auth.Neighbours(Settings(**settings))(scope)
    assert (refusal is None) == lets
    assert lets or "KINDLING_API_KEYS" in str(refusal)


def test_what_a_page_may_read_of_an_answer(app: Callable[..., Any]) -> None:
    answer = ask(app(cors_origins=(PAGE,)), "GET", "/ping", headers={"origin": PAGE})
    told = answer.headers["access-control-expose-headers"].split(", ")
    more = ["x-prompt-tokens", "x-seed", "x-model", "x-inference-ms", "location"]
    assert told == ["x-request-id", "retry-after", "x-should-retry", "idempotent-replayed", *more]
    assert {name: answer.headers[name] for name in DEFAULTS} == {
        "cache-control": "no-store",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


@pytest.mark.parametrize("name", [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "CF-Connecting-IP", "CF-Ray",
    "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "Fastly-Client-IP", "Fly-Client-IP",
])  # fmt: skip
def test_without_keys_a_proxy_on_this_machine_lets_nobody_in(name: str) -> None:
    scope: Scope = {"type": "http", "path": ROUTE, "headers": [(name.lower().encode(), b"203.0.113.9")]}
    for here, settings, lets in [
        ("127.0.0.1", {}, False), ("::1", {}, False), ("127.0.0.1", {"allow_open": True}, True), ("10.0.0.5", {}, True),
    ]:  # fmt: skip
        refusal = auth.Neighbours(Settings(**settings))({**scope, "server": (here, 80)})
        assert (refusal is None) == lets
        assert lets or f"{name.lower()} says that a proxy asks" in str(refusal)


@pytest.mark.parametrize(
    ("site", "path", "settings", "status"),
    [
        ("cross-site", "/v1/models", {}, 403), ("same-site", "/v1/models", {}, 200), ("none", "/v1/models", {}, 200),
        ("same-origin", "/v1/models", {}, 200), ("cross-site", "/v1/models", {"cors_origins": PAGE}, 200),
        ("cross-site", PICTURE, {}, 404), ("cross-site", "/ping", {}, 200),
        ("cross-site", "/v1/models", {"allow_open": True}, 403),
    ],
)  # fmt: skip
def test_without_keys_pages_of_other_sites_read_nothing_but_pictures(
    app: Callable[..., Any], site: str, path: str, settings: dict[str, Any], status: int
) -> None:
    assert ask(app(**settings), "GET", path, headers={"sec-fetch-site": site}).status_code == status


def test_what_says_who_asks_comes_once(app: Callable[..., Any], family: FakeFamily) -> None:
    made = app(api_keys=(KEY, OTHER))
    for name, values in {
        "authorization": (f"Bearer {KEY}", f"Bearer {OTHER}"), "x-api-key": (KEY, KEY), "idempotency-key": ("a", "b"),
    }.items():  # fmt: skip
        heads = [(b"authorization", f"Bearer {KEY}".encode())] * (name != "authorization")
        heads += [(name.encode(), value.encode()) for value in values]
        head, body = spoken(made, {"path": ROUTE, "method": "POST", "headers": heads})
        assert head["status"] == 400
        assert f"The header {name} came 2 times".encode() in body["body"]
    assert family.drawn == []


def test_a_key_is_one_caller_however_it_is_sent(app: Callable[..., Any], family: FakeFamily) -> None:
    basic = base64.b64encode(f"any:{KEY}".encode()).decode()
    ways = [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}]
    ways += [{"authorization": f"Basic {basic}"}, {"authorization": "Bearer gateway", "x-api-key": KEY}]
    with live(app(api_keys=(KEY, OTHER))) as url:
        for sent in [*ways, {"x-api-key": OTHER}]:
            answer = httpx.post(url + ROUTE, headers=sent | {"idempotency-key": "one"}, json={"prompt": "x"})
            assert (answer.status_code, "idempotent-replayed" in answer.headers) == (200, sent in ways[1:])
    assert len(family.drawn) == 2


def test_admin_keys_are_for_what_tells_of_the_worker(app: Callable[..., Any]) -> None:
    made = app(api_keys=(KEY,), admin_keys=(OTHER,))
    for path in ADMIN:
        assert [ask(made, "GET", path, headers={"x-api-key": key}).status_code for key in (KEY, OTHER)] == [403, 200]
    assert [ask(made, "GET", "/v1/models", headers={"x-api-key": key}).status_code for key in (KEY, OTHER)] == [
        200,
        200,
    ]
    assert {ask(app(api_keys=(KEY,)), "GET", path, headers={"x-api-key": KEY}).status_code for path in ADMIN} == {200}
    with pytest.raises(SettingsError, match="set KINDLING_API_KEYS, too"):
        app(admin_keys=(KEY,))


def test_a_path_that_ends_in_a_line_feed_is_another_one(app: Callable[..., Any]) -> None:
    """A route's pattern would match it, and what decides who may ask would not."""
    made = app(api_keys=(KEY,), admin_keys=(OTHER,))
    asked = [("GET", path) for path in (*ADMIN, "/health")] + [("POST", path) for path in (ROUTE, "/generate")]
    for method, path in asked:
        status = ask(made, method, f"{path}%0A", headers={"x-api-key": KEY}, json={"prompt": "x"}).status_code
        assert status == 404, path


def test_keys_that_can_be_guessed_are_told(app: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    app(api_keys=("x", "fifteen letters", "sixteen letters!"))
    assert "2 of the keys have fewer than 16 characters and can be guessed: make one with" in caplog.text
    assert weak(Settings(api_keys=("k" * 16,), admin_keys=("secret",))).startswith("1 of the keys has")
    assert weak(Settings()) == weak(Settings(api_keys=("k" * 16,))) == ""


def test_who_has_no_key_chooses_no_name(app: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = app(api_keys=(KEY,))
    named = {"x-request-id": "chosen"}
    assert ask(made, headers=named, json={"prompt": "x"}).headers["x-request-id"] != "chosen"
    assert "chosen" not in caplog.text
    assert ask(made, headers=named | {"x-api-key": KEY}, json={"prompt": "x"}).headers["x-request-id"] == "chosen"
    assert "chosen" in caplog.text


def test_nobody_learns_what_another_has_drawn(app: Callable[..., Any]) -> None:
    """By how long its prompt is encoded: the encoding is kept for whoever's key it was."""
    made, encoded = app(api_keys=(KEY, OTHER)), list[str]()
    worker = made.api.engine.worker
    worker._family.encode = lambda *given: encoded.append(given[1].prompt) or {}
    with live(made) as url:
        for key, prompt in [(KEY, "mine"), (OTHER, "mine"), (KEY, "mine"), (KEY, "yours")]:
            answer = httpx.post(url + ROUTE, headers={"x-api-key": key}, json={"prompt": prompt})
            assert answer.status_code == 200
    assert encoded == ["mine", "mine", "yours"]
