"""Images by URL, from a host on loopback: who is asked, at which address, and what of its answers is taken."""

import asyncio
import base64
import ipaddress
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from graphs import with_image
from hosts import Host, answer, hosting
from schemathesis_hooks import picture

from comfy_graphs import Graph, graph, node
from fakes import Editor
from handler import Api, Settings, draw_workflow
from handler.api import fetching, outgoing
from handler.api.dialects.aliases import NAMES
from handler.api.fetching import filled
from handler.api.outgoing import AT_ONCE, Outgoing, Target, Unreachable, public
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded, InvalidValue, SettingsError

PNG = picture("PNG")
PLAIN = base64.b64encode(PNG).decode()
IMAGE = {"content_type": "image/png"}
OFF = "KINDLING_FETCH_HOSTS"


@pytest.fixture
def host() -> Iterator[Host]:
    with hosting() as found:
        found.answers["/a.png"] = answer(PNG, **IMAGE)
        yield found


def fetch(url: Any, *hosts: str, most: int = 1_000_000, within: float = 30, **options: Any) -> bytes:
    """What is at a URL."""
    payload = {"image": url}
    found = asyncio.run(filled(payload, Outgoing(hosts, **options), most, Deadline.within(within)))["image"]
    assert isinstance(found, bytes)
    return found


def test_few_are_fetched_at_a_time(host: Host) -> None:
    """What is fetched is counted nowhere until then."""
    seen, most = 0, list[int]()

    async def main() -> None:
        outgoing = Outgoing((host.name,))
        ask = outgoing.ask

        async def counted(*args: Any) -> Any:
            nonlocal seen
            most.append(seen := seen + 1)
            try:
                return await ask(*args)
            finally:
                seen -= 1

        outgoing.ask = counted  # type: ignore[method-assign]
        asked = [filled({"image": f"{host.url}/a.png"}, outgoing, 10**6, Deadline.within(30)) for _ in range(30)]
        assert all(isinstance(each["image"], bytes) for each in await asyncio.gather(*asked))
        for turns in range(20):  # whoever leaves at once, at whatever point, takes no turn along
            leaving = asyncio.create_task(filled({"image": f"{host.url}/a.png"}, outgoing, 10**6, Deadline.within(30)))
            for _ in range(turns):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        assert [outgoing.turns.locked(), outgoing.turns._value] == [False, AT_ONCE]

    asyncio.run(main())
    assert (max(most), len(most) >= 30) == (AT_ONCE, True)


def two_images() -> Graph:
    """A graph whose second image is kept too."""
    made = graph(side=64)
    made["10"], made["11"] = node("LoadImage", image="a.png"), node("LoadImage", image="b.png")
    made["12"] = node("VAEEncode", pixels=["11", 0], vae=["4", 2])
    made["13"] = node("SaveImage", images=["10", 0], filename_prefix="same")
    made["3"]["inputs"] |= {"latent_image": ["12", 0], "denoise": 0.5}
    return made


def why(url: str, *hosts: str, **options: Any) -> str:
    """Why nothing is fetched."""
    with pytest.raises(InvalidValue) as caught:
        fetch(url, *hosts, **options)
    assert caught.value.param == "image"
    assert "secret" not in caught.value.message
    return caught.value.message


def test_every_dialect_takes_urls_where_a_host_is_listed(host: Host, tmp_path: Path) -> None:
    """And draws what it draws of the same bytes in base64."""
    url, text = f"{host.url}/a.png?secret=1", base64.b64encode(PNG).decode()

    def asked(image: str) -> list[tuple[str, dict[str, Any]]]:
        plain = {"prompt": "x", "seed": 7}
        openai = [("image", image), ("image", [image]), ("images", [{"image_url": image}])]
        return [
            *(("/v1/images/edits", plain | {name: value, "mask": image}) for name, value in openai),
            ("/v1/images/generations", plain | {"images": [image], "mask": image}),
            ("/generate", plain | {"images": [image]}),
            ("/", {"inputs": "x", "parameters": {"seed": 7, "image": image}}),
            *(("/generate", plain | {name: image}) for name, field in NAMES.items() if field == "images"),
            ("/models/spark", {"inputs": "x", "parameters": {"seed": 7, "images": [image]}}),
            ("/workflows/two", {"image": PLAIN, "image_2": image, "seed": 7}),
        ]

    with Editor().engine(fetch_hosts=(host.name,), volume=tmp_path) as engine:
        api = Api(engine)
        api.workflows.keep("two", json.dumps(two_images()).encode())
        for (path, by_url), (_, by_bytes) in zip(asked(url), asked(text), strict=True):
            before = len(host.asked)
            found, same = [asyncio.run(api.call(path, payload)) for payload in (by_url, by_bytes)]
            assert found.status == 200, found.body
            assert len(host.asked) == before + 1, "one URL is fetched once"
            assert [each.data for each in found.pictures] == [each.data for each in same.pictures]
    assert {(each.method, each.where) for each in host.asked} == {("GET", "/a.png?secret=1")}
    assert {each.headers["host"] for each in host.asked} == {host.name}


def test_a_workflows_images_on_runpod_may_be_urls_too(host: Host) -> None:
    def asked(image: str) -> Any:
        given = {"workflow": with_image(), "images": [{"name": "cat.png", "image": image}]}
        return asyncio.run(draw_workflow(Api(engine), given, lambda *_: None)).body["images"]

    with Editor().engine(fetch_hosts=(host.name,)) as engine:
        assert asked(f"{host.url}/a.png") == asked(base64.b64encode(PNG).decode())
    assert len(host.asked) == 1


def test_without_the_setting_nobody_is_asked(host: Host) -> None:
    with Editor().engine() as engine:
        for path in ("/v1/images/edits", "/generate"):
            reply = asyncio.run(Api(engine).call(path, {"prompt": "x", "images": [f"{host.url}/a.png"]}))
            assert (reply.status, reply.body["error"]["param"]) == (400, "images")
            assert OFF in reply.body["error"]["message"]
    assert host.asked == []


@pytest.mark.parametrize(
    "said",
    [
        answer(PNG),
        answer(PNG, content_type="application/octet-stream"),
        answer(PNG, content_type="image/webp; charset=x"),
        b"HTTP/1.0 200 OK\r\n\r\n" + PNG,
        b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" + answer(PNG),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n"
        + PNG[:3]
        + b"\r\n%X;a=b\r\n" % (len(PNG) - 3)
        + PNG[3:]
        + b"\r\n0\r\n\r\n",
    ],
    ids=["no type", "octets", "another type", "to the end", "hints", "chunks"],
)
def test_answers_that_are_taken(host: Host, said: bytes) -> None:
    host.answers["/b"] = said
    assert fetch(f"{host.url}/b", host.name) == PNG


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (answer(b"<html>", content_type="text/html"), "sent text/html, which is no image"),
        (answer(b"<svg/>", content_type="application/xml"), "sent application/xml"),
        (answer(b"", status="404 Not Found"), "answered with status 404"),
        (answer(b"", status="500 Oh"), "answered with status 500"),
        (answer(PNG)[:-1], "broke the connection off"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n", "sends more than 1 MB"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_001, "sends more than 1 MB"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nF4241\r\n", "sends more than 1 MB"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\n", "no answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n", "no answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\na: " + b"x" * 200_000, "no answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n", "no answer in HTTP"),
        (b"SSH-2.0-x\r\n\r\n", "no answer in HTTP"),
        (b"\r\n\r\n", "no answer in HTTP"),
        (b"", "broke the connection off"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, "no answer in HTTP"),
    ],
    ids=range(16),
)
def test_answers_that_are_not(host: Host, said: bytes, told: str) -> None:
    host.answers["/b"] = said
    assert told in why(f"{host.url}/b?secret", host.name)


def test_what_never_ends_is_left(host: Host) -> None:
    """A gigabyte stops at the bound, and what drips at the end of the time: the connection is cut then."""
    ended = threading.Semaphore(0)

    def endless(say: Callable[[bytes], object]) -> None:
        say(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(1000):
                say(bytes(1 << 20))
        except OSError:
            ended.release()

    def drip(say: Callable[[bytes], object], start: bytes) -> None:
        say(start)
        try:
            while not ended.acquire(timeout=0.01):
                say(b"x")
        except OSError:
            ended.release()

    host.answers["/endless"] = endless
    host.answers["/drip"] = lambda say: drip(say, b"HTTP/1.1 200 OK\r\ncontent-length: 900000\r\n\r\n")
    host.answers["/head"] = lambda say: drip(say, b"HTTP/1.1 200 OK\r\na: ")
    assert "more than 1 MB" in why(f"{host.url}/endless", host.name)
    assert ended.acquire(timeout=30)
    for path in ("/drip", "/head"):
        with pytest.raises((DeadlineExceeded, InvalidValue)):
            fetch(host.url + path, host.name, within=0.3)
        assert ended.acquire(timeout=30)


def test_an_image_has_its_own_time_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.2)
    held = threading.Event()
    host.answers["/b"] = lambda say: held.wait(30)
    assert "did not answer in time" in why(f"{host.url}/b", host.name)
    held.set()


def test_all_images_of_a_request_have_one_bound(host: Host) -> None:
    payload = {"images": [f"{host.url}/a.png?{i}" for i in range(3)]}
    most = 2 * len(PNG)
    with pytest.raises(InvalidValue, match="sends more than"):
        asyncio.run(filled(payload, Outgoing((host.name,)), most, Deadline.within(30)))


@pytest.mark.parametrize("hosts", [(), ("images.example",), ("127.0.0.1",), ("127.0.0.1:1",), ("localhost",)])
def test_other_hosts_and_ports_are_not_asked(host: Host, hosts: tuple[str, ...]) -> None:
    if hosts:
        assert "is not among the hosts that may be asked" in why(f"{host.url}/a.png?secret", *hosts)
    assert host.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@{name}/a.png",
        "http://{name}@evil.example/secret",
        "http://evil.example#@{name}/secret",
        "http://evil.example\\@{name}/secret",
        "http://0x7f.1:{port}/secret",
        "http://2130706433:{port}/secret",
        "http://127.1:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "http://{name}.evil.example/secret",
        "http://127.0.0.1:{port}0/secret",
        "http://127.0.0.1:x/secret",
        "http:///secret",
        "http://{name}/a b",
        "http://{name}/a\r\nHost: secret",
        "http://{name}/é",
        "https://" + "a" * 5000,
    ],
)
def test_urls_that_mean_something_else(host: Host, url: str) -> None:
    why(url.format(name=host.name, port=host.port), host.name)
    assert host.asked == []


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ("http://127.0.0.2:{port}/a.png?secret", "127.0.0.2 is not among the hosts"),
        ("http://169.254.169.254/latest/secret", "169.254.169.254 is not among the hosts"),
        ("file:///etc/passwd?secret", "is no http or https URL"),
        ("http://[::1/secret", "127.0.0.1 leads on to what is no URL"),
        ("//evil.example/secret", "evil.example is not among the hosts"),
        ("/loop?secret", "leads on more than 3 times"),
    ],
)
def test_where_a_redirect_leads_is_looked_at_anew(host: Host, there: str, told: str) -> None:
    host.answers["/loop"] = answer(status="302 Found", location="/loop?secret")
    host.answers["/b"] = answer(status="302 Found", location=there.format(port=host.port))
    assert told in why(f"{host.url}/b", host.name)
    assert "/a.png" not in {each.where for each in host.asked}


def test_a_redirect_to_a_listed_host_is_followed(host: Host) -> None:
    host.answers["/b"] = answer(status="307 Temporary Redirect", location="a.png")
    assert fetch(f"{host.url}/b", host.name) == PNG


INSIDE = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
    *("192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("::", "::1", "fe80::1%eth0", "::ffff:93.184.216.34", "4000::1", "2001:0:7f00:1::", "2001:db8::1", "100::1"),
    *("fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_a_name_that_leads_inside_is_not_followed(address: str) -> None:
    """Also among public ones; nothing is sent to any."""
    for found in ([address], ["93.184.216.34", address]):
        told = why("http://images.example/secret", "images.example", resolve=lambda host, port, found=found: found)
        assert "images.example is at an address that is not public" in told


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822"])
def test_what_is_public_is_so(address: str) -> None:
    assert public(ipaddress.ip_address(address))


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(host: Host) -> None:
    """A name is resolved once for each request: what it leads to afterwards, such as inside, is not asked."""
    asked: list[tuple[str, int]] = []

    def rebinding(name: str, port: int) -> list[str]:
        asked.append((name, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    hosts = (f"images.example:{host.port}", f"127.0.0.1:{host.port}")
    url = f"http://images.example:{host.port}/a.png"
    assert fetch(url, *hosts, resolve=rebinding) == PNG
    assert asked == [("images.example", host.port)]
    assert host.asked[0].headers["host"] == f"images.example:{host.port}"
    assert "not public" in why(url, *hosts, resolve=rebinding)


def test_an_address_inside_is_asked_at_its_listed_port_alone(host: Host) -> None:
    url, inside = f"http://images.example:{host.port}/a.png", {"resolve": lambda *_: ["127.0.0.1"]}
    for other in ("127.0.0.1", f"127.0.0.1:{host.port + 1}"):
        assert "not public" in why(url, f"images.example:{host.port}", other, **inside)
    assert not host.asked


def test_a_redirect_is_resolved_and_checked_as_any_other(host: Host) -> None:
    host.answers["/b"] = answer(status="302 Found", location=f"http://inner.example:{host.port}/a.png?secret")
    hosts = tuple(f"{name}:{host.port}" for name in ("images.example", "inner.example", "127.0.0.1"))
    addresses = {"images.example": ["127.0.0.1"], "inner.example": ["10.0.0.1"]}
    told = why(f"http://images.example:{host.port}/b", *hosts, resolve=lambda name, _: addresses[name])
    assert "inner.example is at an address that is not public" in told
    assert [each.where for each in host.asked] == ["/b"]


def test_localhost_is_loopback_where_it_is_listed(host: Host) -> None:
    assert fetch(f"http://localhost:{host.port}/a.png", f"LOCALHOST:{host.port}".lower()) == PNG
    inside = {"resolve": lambda *_: ["10.0.0.1"]}
    assert "not public" in why(f"http://localhost:{host.port}/a.png", f"localhost:{host.port}", **inside)


def test_a_name_that_is_not_found_and_a_door_that_is_shut() -> None:
    def unknown(*_: object) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    assert "cannot be reached" in why("http://images.example/secret", "images.example", resolve=unknown)
    assert "cannot be reached" in why("http://images.example/secret", "images.example", resolve=lambda *_: [])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "cannot be reached" in why(f"http://127.0.0.1:{port}/secret", f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of images.example, with its key, signed by itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, names = datetime.now(UTC), x509.SubjectAlternativeName([x509.DNSName("images.example")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    signed = made.add_extension(names, critical=True).sign(key, SHA256())
    place = tmp_path_factory.mktemp("certificate") / "both.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    place.write_bytes(private + signed.public_bytes(Encoding.PEM))
    return place


@pytest.mark.parametrize(
    ("trusted", "name", "told"),
    [(True, "images.example", ""), (True, "other.example", "certificate"), (False, "images.example", "certificate")],
)
def test_a_certificate_must_be_trusted_and_the_hosts(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, name: str, told: str
) -> None:
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    outgoing._trusted.cache_clear()
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)
    with hosting(own) as host:
        host.answers["/a.png"] = answer(PNG, **IMAGE)
        url, hosts = f"https://{name}:{host.port}/a.png", (f"{name}:{host.port}", f"127.0.0.1:{host.port}")
        here: dict[str, Any] = {"resolve": lambda *_: ["127.0.0.1"]}
        if told:
            assert told in why(url, *hosts, **here)
        else:
            assert fetch(url, *hosts, **here) == PNG
            host.answers["/b"] = answer(status="302 Found", location=f"http://{name}:{host.port}/a.png")
            assert "without https" in why(url.replace("/a.png", "/b"), *hosts, **here)
    outgoing._trusted.cache_clear()


@pytest.mark.parametrize("wrong", ["http://a.example", "a.example/x", "*", "*.example", "a b", "a:b", "u@a.example"])
def test_a_host_in_the_setting_is_one(wrong: str) -> None:
    with pytest.raises(SettingsError, match="KINDLING_FETCH_HOSTS"):
        Settings.from_env({"KINDLING_FETCH_HOSTS": f"good.example,{wrong}"})


def test_nothing_of_a_url_but_its_host_is_told(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    host.answers["/b"] = answer(b"", status="500 Oh")
    with Editor().engine(fetch_hosts=(host.name,)) as engine:
        reply = asyncio.run(Api(engine).call("/generate", {"prompt": "x", "images": [f"{host.url}/b?canary=1"]}))
    assert "answered with status 500" in reply.body["error"]["message"]
    assert "canary" not in caplog.text + json.dumps(reply.body)


def test_a_target_is_what_its_url_says() -> None:
    assert Target.of("HTTPS://Images.Example.:8443?a") == Target("https", "images.example", 8443, "/?a")
    assert Target.of("http://[::1]/x#y").named == "[::1]"
    with pytest.raises(Unreachable):
        Target.of("ftp://a/x")
