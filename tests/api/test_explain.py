"""A graph explained: on which worker, all that is wrong with it, its files, its pictures, and what that takes."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import originals
import pytest
import torch
from graphs import load, node, plain, request, with_image

from handler import MODELS, Settings
from handler.api.comfy import asking
from handler.api.comfy.explaining import explain
from handler.api.comfy.foretelling import Machine
from handler.api.comfy.grounds import Ground
from handler.api.comfy.report import NodeTold, Report
from handler.api.dialects.comfy.meanings import fields, meaning, sentences
from handler.api.dialects.comfy.opening import Opened, opened
from handler.api.dialects.comfy.table import ALIASES, PLAIN
from handler.catalog.gpus import GPUS
from handler.core.errors import GraphRefused
from handler.core.request import ImageRequest
from handler.volume import receipts
from handler.volume.receipts import Candidate, Figures, Outcome, Receipt
from handler.worker.renting import SLOW

FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(4),
    "guidance_in.in_layer.weight": torch.zeros(4, 4),
}


def ground(volume: Path = Path("/nonexistent"), model: str = "spark", **given: Any) -> Ground:
    """An H200 with nothing on its volume, where nobody has said which model serves."""
    settings = Settings(volume=volume, model=model)
    return replace(Ground(settings, MODELS[model], Machine(GPUS["H200"]), load, fixed=False), **given)


def saved(image: str) -> Any:
    return node("SaveImage", images=[image, 0], filename_prefix="x")


def told(graph: Any, on: Ground | None = None) -> Report:
    return explain(Opened(graph, "API format"), on or ground())


def of(report: Report, name: str) -> NodeTold:
    return next(one for one in report.nodes if one.id == name)


def test_every_class_has_a_sentence_that_names_its_inputs() -> None:
    assert sentences().keys() == PLAIN.keys()
    for name, row in PLAIN.items():
        assert {*fields(sentences()[name])} <= row.inputs.keys(), name
    for name, row in ALIASES.items():
        assert "(nothing)" not in meaning(node(name, **dict.fromkeys(row.inputs, "x"))), name


def test_a_node_is_told_with_its_values() -> None:
    loader = node("DiffusionModelLoaderKJ", model_name="mine.safetensors")
    assert meaning(loader) == "Loads the model mine.safetensors."
    assert meaning(node("CLIPTextEncode", text="a\n\x1b[31m cat", clip=["1", 1])) == 'The prompt "a [31m cat".'
    assert meaning(node("CLIPTextEncode", text=["6", 0])) == "The prompt (from node 6)."
    assert len(meaning(node("CLIPTextEncode", text="x" * 100_000))) < 100
    assert meaning(node("CLIPTextEncode", text=[])) == meaning({"class_type": "CLIPTextEncode", "inputs": 5}).replace(
        '""', "(nothing)"
    )


def test_a_plain_graph_runs_with_the_row_that_its_model_means() -> None:
    report = told(plain("sd_xl_base_1.0.safetensors", cfg=7.0))
    assert (report.verdict, report.why, report.model.settings) == ("runs", (), ("KINDLING_MODEL=sdxl",))
    assert (report.ready, report.missing) == (False, ("bring sdxl to the volume: python -m handler fetch sdxl",))
    assert [one.id for one in report.nodes] == ["1", "2", "3", "4", "5", "6", "7"]
    assert {one.state for one in report.nodes} == {"read"}
    [pictures] = report.pictures
    assert pictures.passes[0].words == (
        'A picture of 256x256: "a red circle". Not: "blurry". 4 steps of euler on the schedule simple, cfg 7, seed 7.'
    )
    json.dumps(report.told())


def test_spark_is_ready_anywhere() -> None:
    report = told(plain())
    assert (report.verdict, report.ready, report.missing) == ("runs", True, ())
    assert of(report, "5").notes == ("with cfg 1 there is no guidance, so that the negative prompt changes nothing.",)


def test_the_commands_ask_for_the_same() -> None:
    graph = plain(**{"seed": 2**64 - 1})
    graph["2"]["inputs"]["text"] = 'it\'s "red"; $(reboot) `x` ü\n'
    prompt, native = told(graph).curl
    assert prompt.startswith("curl -s http://127.0.0.1:8000/prompt ")
    assert json.loads(shlex.split(prompt)[-1]) == {"prompt": graph}
    assert ImageRequest.parse(json.loads(shlex.split(native)[-1])) == request(graph)
    assert (prompt + native).isprintable()


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (with_image(), "It works from images"),
        (plain() | {"9": node("ImageInvert", image=["6", 0]), "7": saved("9")}, "are changed"),
        (
            plain()
            | {
                "8": node("KSampler", **plain(denoise=0.5, latent_image=["5", 0])["5"]["inputs"]),
                "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
                "7": saved("9"),
            },
            "goes on from another's picture",
        ),
    ],
)
def test_what_one_request_cannot_say_has_no_command(graph: Any, why: str) -> None:
    report = told(graph)
    assert report.verdict == "runs"
    assert not any("/generate" in command for command in report.curl)
    assert why in report.curl_notes[0]


def test_passes_and_changes_are_told_in_the_order_of_drawing() -> None:
    graph = plain() | {
        "8": node("LatentUpscaleBy", samples=["5", 0], upscale_method="bilinear", scale_by=2.0),
        "9": node("KSampler", **plain(denoise=0.5, latent_image=["8", 0])["5"]["inputs"]),
        "10": node("VAEDecode", samples=["9", 0], vae=["1", 2]),
        "11": node("ImageInvert", image=["10", 0]),
        "7": saved("11"),
        "12": node("PreviewImage", images=["11", 0]),
    }
    [pictures] = told(graph).pictures
    assert (pictures.outputs, pictures.count, pictures.changes) == (("7", "12"), 1, 1)
    first, second = (one.words for one in pictures.passes)
    assert first.startswith("A picture of 256x256")
    assert second.startswith("A picture of 512x512")
    assert second.endswith("these are the last of 8 steps. It starts from the picture of the pass before.")


def test_all_faults_are_told_at_once() -> None:
    graph = plain("nobody-knows-xl.safetensors", positive=["8", 0], sampler_name="dpm_adaptive")
    graph |= {
        "8": node("ControlNetApply", conditioning=["2", 0], control_net=["9", 0]),
        "9": node("ControlNetLoader"),
        "10": node("KSampler (inspire)", model=["11", 0]),
        "11": node("LoraLoaderModelOnly", model=["1", 0], lora_name="x.safetensors", strength_model=50.0),
        "12": saved("10"),
    }
    report = told(graph)
    assert (report.verdict, report.pictures, report.curl) == ("refused", (), ())
    assert {one.id for one in report.nodes if one.state == "refused"} == {"8", "9", "10", "11"}
    assert of(report, "8").faults[0].startswith("ControlNet is not offered")
    assert of(report, "10").faults == ("No class of this name is known here.",)
    assert "is too much" in of(report, "11").faults[0]  # which only an unknown class needs
    assert {one.id for one in report.nodes if one.state == "waits"} == {"5", "6", "7", "12"}
    assert report.model.settings == ("KINDLING_MODEL=sdxl", "KINDLING_WEIGHTS=nobody-knows-xl.safetensors")
    assert [one.name for one in report.files] == ["nobody-knows-xl.safetensors", "x.safetensors"]


def test_what_runs_in_part_says_which_outputs_do_not() -> None:
    graph = plain() | {"8": node("Nobody", image=["6", 0]), "9": saved("8")}
    report = told(graph)
    assert (report.verdict, report.pictures[0].outputs) == ("runs in part", ("7",))
    assert report.why == ("No picture for node 9:", "Node 8 (Nobody): No class of this name is known here.")


def test_what_no_output_needs_is_told_and_not_judged() -> None:
    graph = plain()
    graph |= {
        "8": node("Nobody"),
        "9": node("CheckpointLoaderSimple", ckpt_name="other.safetensors"),
        "10": node("ComfySwitchNode", switch=True, on_true=["2", 0], on_false=["11", 0]),
        "11": node("Nobody"),
    }
    graph["5"]["inputs"]["positive"] = ["10", 0]
    report = told(graph)
    assert (report.verdict, report.why) == ("runs", ())
    assert {one.id for one in report.nodes if one.state == "unused"} == {"8", "9", "11"}
    assert [one.name for one in report.files] == ["spark.safetensors"]


def test_a_graph_without_an_output_is_judged_as_a_whole() -> None:
    graph = plain()
    del graph["7"]
    graph["5"]["inputs"]["steps"] = 5000
    report = told(graph)
    assert report.verdict == "refused"
    assert report.why[0].startswith("No node gives a picture")
    assert "5000 steps are too many" in report.why[1]


def test_what_drawing_would_refuse_is_refused() -> None:
    graph = plain()
    graph["7"]["inputs"]["filename_prefix"] = "../../x"
    report = told(graph)
    assert (report.verdict, report.why) == (
        "refused",
        ("Node 7 cannot be drawn: Saving an image outside the output folder is not allowed.",),
    )


@pytest.mark.parametrize(
    ("graph", "row", "by"),
    [
        (plain("dream.safetensors"), "sd1.5", "the size of 256 pixels a side"),
        (plain("dreamXL_v3.ckpt"), "sdxl", "its name"),
        (plain("my-flux-schnell-merge.gguf"), "flux-schnell", "its name"),
        (plain("x.safetensors") | {"8": node("CLIPTextEncodeSDXL")}, "sdxl", "the node CLIPTextEncodeSDXL"),
        (plain("x.ckpt") | {"4": node("EmptyLatentImage", width=1024, height=1024, batch_size=1)}, "sdxl", "size"),
        (
            plain(clip=["8", 0]) | {"1": node("UNETLoader", unet_name="x.safetensors")}
            | {"8": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2")},
            "z-image-turbo",
            "",
        ),
    ],
)  # fmt: skip
def test_what_nobody_has_seen_is_guessed_and_called_so(graph: Any, row: str, by: str) -> None:
    model = told(graph).model
    assert (model.id, model.guess) == (row, True)
    assert by in model.because
    assert "a guess by" in model.because


def test_a_file_on_the_volume_is_told_by_its_tensors(tmp_path: Path) -> None:
    originals.write({n: t.bfloat16() for n, t in FLUX.items()}, tmp_path / "ComfyUI/models/unet/mine.safetensors")
    graph = plain() | {"1": node("UNETLoader", unet_name="sub\\mine.safetensors")}
    report = told(graph, ground(tmp_path))
    assert (report.model.id, report.model.guess, report.model.settings[1]) == (
        "flux-dev",
        False,
        "KINDLING_WEIGHTS=mine.safetensors",
    )
    assert (report.files[0].state, report.model.commercial) == ("here", False)


def test_files_are_looked_for_and_their_places_named(tmp_path: Path) -> None:
    graph = with_image() | {
        "1": node("CheckpointLoaderSimple", ckpt_name="sub/own model.ckpt"),
        "8": node("LoraLoaderModelOnly", model=["1", 0], lora_name="here.safetensors", strength_model=1),
        "9": node("LoraLoaderModelOnly", model=["8", 0], lora_name="away.safetensors", strength_model=1),
        "12": node("LoadImage", image="missing.png"),
        "13": node("ImageCompositeMasked", destination=["10", 0], source=["12", 0], x=0, y=0, resize_source=False),
    }  # fmt: skip
    graph["5"]["inputs"]["model"], graph["11"]["inputs"]["pixels"] = ["9", 0], ["13", 0]
    graph["2"]["inputs"]["text"] = "embedding:style a cat"
    report = told(graph, ground(tmp_path, files={"loras": ("here.safetensors",), "embeddings": ()}))
    assert report.verdict == "runs"
    assert {one.name: (one.folder, one.state) for one in report.files} == {
        "sub/own model.ckpt": ("checkpoints", "missing"),
        "here.safetensors": ("loras", "here"),
        "away.safetensors": ("loras", "missing"),
        "cat.png": ("input", "here"),
        "missing.png": ("input", "missing"),
        "style": ("embeddings", "missing"),
    }
    assert report.model.settings[1] == "KINDLING_WEIGHTS='sub/own model.safetensors'"
    assert report.missing[1] == (
        "put sub/own model.safetensors into checkpoints/ on the volume, the safetensors of own model.ckpt"
    )
    assert shlex.split(report.curl[0])[-1] in ('image=@"cat.png"', 'image=@"missing.png"')


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cat.png", ['image=@"cat.png"']),
        ("a/it's b/cat.png", ['image=@"cat.png"', "--form-string", "subfolder=a/it's b"]),
        ("cat.png [output]", ['image=@"cat.png"', "--form-string", "type=output"]),
    ],
)
def test_an_image_is_sent_to_where_the_graph_looks_for_it(name: str, said: list[str]) -> None:
    assert shlex.split(asking.upload(name, "http://here", keyed=False))[4:] == said


def test_a_command_is_no_longer_than_a_shell_takes() -> None:
    assert asking.prompt({"1": "'" * 60_000}, "http://here", keyed=False) == ""


def test_a_vae_of_ones_own_lies_over_the_row() -> None:
    graph = plain("v1-5-pruned-emaonly.safetensors", cfg=1.4000000000000001)
    graph |= {"8": node("VAELoader", vae_name="vae-ft-mse-840000.safetensors")}
    graph["6"]["inputs"]["vae"] = ["8", 0]
    report = told(graph)
    assert report.verdict == "runs"
    assert report.model.settings == ("KINDLING_MODEL=sd1.5", "KINDLING_WEIGHTS=vae-ft-mse-840000.safetensors")
    assert report.missing == (
        "bring sd1.5 to the volume: python -m handler fetch sd1.5",
        "put vae-ft-mse-840000.safetensors into vae/ on the volume",
    )
    assert "cfg 1.4, seed 7" in of(report, "5").meaning


def test_a_worker_that_serves_another_model_says_what_to_start() -> None:
    graph = plain("sd_xl_base_1.0.safetensors")
    report = told(graph, ground(fixed=True, running=True))
    assert (report.verdict, report.model.id) == ("runs", "sdxl")
    assert report.missing[0] == "start a worker with KINDLING_MODEL=sdxl, not KINDLING_MODEL=spark"
    assert told(plain(), ground(fixed=True, running=True)).ready


def test_a_server_does_not_say_where_its_own_files_lie() -> None:
    settings = Settings(model="sdxl", weights=("/secret/place/mine.safetensors",), vae="/secret/vae")
    for running, secret in ((True, False), (False, True)):
        on = ground(settings=settings, spec=MODELS["sdxl"], fixed=True, running=running)
        report = told(plain("mine.safetensors", cfg=3.0), on)
        assert report.verdict == "runs"
        assert ("/secret" in json.dumps(report.told())) is secret
        assert report.model.settings[0] == "KINDLING_MODEL=sdxl"


def test_placeholders_are_no_files() -> None:
    report = told(plain("{{model}}"))
    assert report.verdict == "refused"
    assert "is a placeholder" in of(report, "1").faults[0]


def test_names_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    inside = tmp_path / "volume"
    (inside / "comfy/jobs").mkdir(parents=True)
    (inside / "comfy/jobs/1.json").write_bytes(b"{}")
    for name in (
        "comfy/jobs/1.json",
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..\\secret.safetensors",
    ):
        report = told(plain(name), ground(inside))
        assert report.files[0].state == "missing"
        assert ".." not in report.model.settings[1]


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (plain(latent_image=["5", 0]), "goes round in a circle: 5 -> 5"),
        ({"1": 5}, "missing the class_type"),
        ({}, "No prompt provided"),
        ({f"{n}": node("Reroute") for n in range(10_001)}, "at most 10000 are read"),
        ({"nodes": []}, "UI format"),
    ],
)
def test_what_is_no_graph_is_one_line(graph: Any, said: str) -> None:
    with pytest.raises(GraphRefused, match=re.escape(said)) as refused:
        told(graph)
    assert refused.value.message.isprintable()


def test_others_words_are_plain_and_short() -> None:
    graph = plain() | {"8": node("\x1b[2J" + "x" * 150, a=["7", 0])}
    graph["8\x07"] = {**node("PreviewImage", images=["8", 0]), "_meta": {"title": "\x1b]0;title\x07" + "y" * 5000}}
    text = json.dumps(asdict(replace(told(graph), curl=())), ensure_ascii=False)
    assert text.isprintable()
    assert "x" * 100 not in text
    assert "y" * 100 not in text


def receipt(volume: Path, device: str) -> Receipt:
    """One that is followed: 2 s for a picture of spark's, compiled."""
    winner, figures = Candidate("fp32", True), Figures(24, 2.0, 2.1, 0.5, 1.25, 9.0, dollars=0.001)
    outcomes = (Outcome(winner, "measured", figures),)
    made = Receipt(
        "spark", "embedded", device, winner, outcomes, "the fastest", "latency", {}, "256x256 in 4 steps", "", {}, "",
        "2026-11-01T00:00:00",
    )  # fmt: skip
    return receipts.keep(made, volume)


def test_time_is_the_receipts_in_proportion(tmp_path: Path) -> None:
    here = receipt(tmp_path, "NVIDIA H200")
    on = ground(tmp_path, settings=Settings(volume=tmp_path, precision="fp32", compile="on"))
    same, time = told(plain(), on), told(plain(steps=8, cfg=2.0, sampler_name="heun"), on).time
    assert same.time
    assert time
    assert same.memory
    assert (same.time.pictures_s, same.time.start_s, same.time.dollars) == (2.0, 9.0, 0.001)
    assert same.time.rests_on == (
        "Receipt 1 of 2026-11-01 measured 2.00 s for 256x256 in 4 steps in fp32 on NVIDIA H200."
    )
    assert (time.pictures_s, time.dollars) == (16.0, 0.008)
    assert "8 times the work" in time.rests_on
    assert "receipt 1 measured 1.2 GB at most" in same.memory.rests_on
    running = told(plain(), replace(on, machine=Machine(GPUS["T4"], here))).time
    assert running
    assert running.pictures_s == 2.0
    nobody = told(plain(), replace(on, machine=Machine(GPUS["T4"]))).time
    assert nobody
    assert nobody.pictures_s is None
    assert nobody.rests_on.startswith("Nobody has measured spark in fp32 on this NVIDIA T4")


def test_what_does_not_fit_is_told_with_its_arithmetic() -> None:
    small = Machine(GPUS["T4"])
    report = told(plain("flux1-dev.safetensors"), ground(machine=small, settings=Settings(offload="off")))
    assert (report.verdict, report.memory and report.memory.fits) == ("runs", False)
    assert report.missing[-1].startswith("take a larger machine: ")
    slow = told(plain("flux2_dev.safetensors"), ground(machine=small)).memory
    assert slow
    assert (slow.fits, slow.warning, "inf" in slow.arithmetic) == (True, SLOW["blocks"], False)


def test_a_wrapped_file_is_opened_too() -> None:
    data = json.dumps({"prompt": plain()}).encode()
    assert explain(opened(data), ground()).verdict == "runs"
