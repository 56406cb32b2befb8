"""`comfy explain` and `comfy run`, as people use them."""

import base64
import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from graphs import pixels, png, with_image

from comfy_graphs import graph, node
from handler.__main__ import main
from handler.api.codec import chunks
from serving import Served


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))


def put(made: Any, name: str = "graph.json") -> str:
    Path(name).write_text(made if isinstance(made, str) else json.dumps(made))
    return name


def test_a_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comfy", "explain", put(graph(text="a \x1b[31mred circle"))]) == 0
    out = capsys.readouterr().out
    assert out.startswith("VERDICT  runs, with KINDLING_MODEL=spark\nMODEL    spark, which the name")
    for part in ("PICTURES", "FILES", "MEMORY AND TIME", "NODES", "COMMANDS", "4 steps of euler", "MIT License"):
        assert part in out
    assert "\x1b" not in out
    assert max(map(len, out.partition("COMMANDS")[0].splitlines())) <= 120


def test_the_report_as_json_and_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.dumps({"prompt": graph()}).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert main(["comfy", "explain", "-", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verdict"], report["ready"], report["model"]["id"]) == ("runs", True, "spark")


def test_the_gpu_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comfy", "explain", put(graph()), "--gpu", "l40s"]) == 0
    assert "NVIDIA L40S: fits: " in capsys.readouterr().out
    assert main(["comfy", "explain", put(graph()), "--gpu", "abacus"]) == 2
    assert "'abacus' is not in the table of GPUs. Known: T4" in capsys.readouterr().err


def test_what_is_refused_is_one_and_says_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graph() | {"5": node("EmptyLatentImage", width="wide", height=64, batch_size=1)}
    made["6"] = node("Nobody")
    assert main(["comfy", "explain", put(made)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("VERDICT  refused\n")
    assert "CANNOT: Failed to convert an input value to a INT value" in out
    assert "CANNOT: No class of this name is known here." in out
    assert main(["comfy", "run", put(made)]) == 1
    assert capsys.readouterr().err.startswith("VERDICT  refused\n")
    monkeypatch.setenv("KINDLING_MODEL", "sdxl")
    assert main(["comfy", "run", put(graph())]) == 1
    assert "1. Start a worker with KINDLING_MODEL=spark, not KINDLING_MODEL=sdxl." in capsys.readouterr().err
    assert not Path("out.png").exists()


HOSTILE = {
    "depth": "[" * 1_000_000,
    "objects": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "values": json.dumps({"1": node("X", **{f"i{n}": [0] * 1000 for n in range(1200)})}),
    "numbers": '{"1": {"class_type": "PrimitiveInt", "inputs": {"value": ' + "9" * 100_000 + "}}}",
    "surrogate": '{"1": {"class_type": "\\ud800"}}',
    "cycle": json.dumps({str(n): node("Reroute", value=[str((n + 1) % 5000), 0]) for n in range(5000)})[:-1]
    + ', "9999": {"class_type": "PreviewAny", "inputs": {"source": ["0", 0]}}}',
    "types": json.dumps({"1": [], "2": None, "3": "x"}),
    "nothing": "",
    "nan": '{"1": NaN}',
    "latin": "\xff\xfe\x00",
    "picture": "\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXtprompt\0{",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("h.json").write_bytes(HOSTILE[name].encode("latin-1"))
    assert main(["comfy", "explain", "h.json"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("kindling: ")
    assert (found.err.count("\n"), found.err[:-1].isprintable()) == (1, True)


ODD = "a\x1b[31m\x9b\u202e"  # what a terminal would obey
FILES = {
    "node": json.loads(json.dumps(graph()).replace('"9"', json.dumps(f"9{ODD}"))),
    "class": graph() | {"9": node(ODD, images=["8", 0])},
    "file": graph() | {"4": node("CheckpointLoaderSimple", ckpt_name=f"{ODD}.safetensors")},
    "image": graph() | {"5": node("VAEEncode", pixels=["10", 0], vae=["4", 2]), "10": node("LoadImage", image=ODD)},
    "note": {"nodes": [{"id": 1, "type": ODD, "widgets_values": [1]}, {"id": 9, "type": "SaveImage"}]},
}


@pytest.mark.parametrize("act", ["explain", "run", "add x", "convert"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_that_a_terminal_obeys_is_printed(name: str, act: str, capsys: pytest.CaptureFixture[str]) -> None:
    if (name, act) == ("node", "run"):
        return  # which draws it
    main(["comfy", *act.split(), put(FILES[name])])
    lines = [line for text in capsys.readouterr() for line in text.split("\n")]
    assert [line for line in lines if not line.isprintable()] == []


def test_what_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["away.json"], ["."], ["a\0b"], [put(graph()), "--image", "x"], [put(graph()), "--image", "x=away"]):
        assert main(["comfy", "explain", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["comfy", "run", put(graph()), "-o", "out.jpg"]) == 2
    assert "only a PNG takes the graph with it" in capsys.readouterr().err


def test_images_lie_beside_the_graph_or_are_given(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A name in a graph leads to no other folder."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "cat.png").write_bytes(png())
    for name in ("../cat.png", "inner/../../cat.png", "cat.png [output]", str(tmp_path / "cat.png")):
        made = with_image()
        made["10"]["inputs"]["image"] = name
        assert main(["comfy", "explain", put(made, "inner/graph.json"), "--json"]) == 0
        assert not json.loads(capsys.readouterr().out)["ready"]
        assert main(["comfy", "explain", "inner/graph.json", "--json", "--image", "cat.png=cat.png"]) == 0
        assert json.loads(capsys.readouterr().out)["ready"]


def several() -> Any:
    """A picture, a smaller one of it, one drawn anew of it, and a batch of an edit."""
    made = graph(text="a blue star", side=128)
    again = {**made["3"]["inputs"], "denoise": 0.6}
    return made | {
        "10": node("ImageScaleBy", image=["8", 0], upscale_method="lanczos", scale_by=0.5),
        "11": node("SaveImage", images=["10", 0], filename_prefix="small"),
        "12": node("PreviewImage", images=["8", 0]),
        "20": node("LatentUpscaleBy", samples=["3", 0], upscale_method="bilinear", scale_by=1.5),
        "21": node("KSampler", **{**again, "latent_image": ["20", 0]}),
        "22": node("VAEDecode", samples=["21", 0], vae=["4", 2]),
        "23": node("SaveImage", images=["22", 0], filename_prefix="again"),
        "30": node("LoadImage", image="cat.png"),
        "31": node("VAEEncode", pixels=["30", 0], vae=["4", 2]),
        "32": node("RepeatLatentBatch", samples=["31", 0], amount=2),
        "33": node("KSampler", **{**again, "latent_image": ["32", 0]}),
        "34": node("VAEDecode", samples=["33", 0], vae=["4", 2]),
        "35": node("SaveImage", images=["34", 0], filename_prefix="edit"),
    }


def test_run_draws_what_a_server_draws(
    server: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels, with the graph; also those of the command that explain gives for /generate."""
    Path("cat.png").write_bytes(png(128, 128, hole=None))
    assert main(["comfy", "run", put(several()), "-o", "out.png", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["out.png", *(f"out-{n}.png" for n in range(2, 6))]
    with httpx.Client(base_url=server.url, timeout=60) as client:
        client.post("/upload/image", files={"image": ("cat.png", Path("cat.png").read_bytes())})
        outputs = drawn(client, several())
        images = [image for one in ("9", "11", "23", "35") for image in outputs[one]["images"]]
        theirs = [client.get("/view", params=image).content for image in images]
    ours = [Path(line["file"]).read_bytes() for line in lines]
    assert [pixels(one).tolist() for one in ours] == [pixels(one).tolist() for one in theirs]
    texts = dict(bytes(body).split(b"\0", 1) for kind, body, _ in chunks(ours[1]) if kind == b"tEXt")
    assert json.loads(texts[b"prompt"]) == several()


def test_the_commands_draw_the_same(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comfy", "explain", put(graph(text="it's a $red circle")), "--json"]) == 0
    prompt, native = (shlex.split(one)[-1] for one in json.loads(capsys.readouterr().out)["curl"])
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answer = client.post("/generate", content=native, headers={"content-type": "application/json"}).json()
        [image] = drawn(client, json.loads(prompt)["prompt"])["9"]["images"]
        theirs = pixels(client.get("/view", params=image).content)
    assert (pixels(base64.b64decode(answer["images"][0]["b64_json"])) == theirs).all()


def drawn(client: httpx.Client, made: Any) -> Any:
    """A prompt's outputs, once they are there."""
    posted = client.post("/prompt", json={"prompt": made})
    assert posted.status_code == 200, posted.text
    prompt_id = posted.json()["prompt_id"]
    while not (found := client.get(f"/history/{prompt_id}").json()):
        pass
    assert found[prompt_id]["status"]["completed"], found
    return found[prompt_id]["outputs"]
