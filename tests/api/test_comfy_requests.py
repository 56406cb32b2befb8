"""What ComfyUI's graphs ask for: prompts, sampling, models, LoRAs, sizes."""

import math
from typing import Any

import numpy as np
import pytest
from graphs import Graph, load, node, plain, plan, request, served

from handler.api.dialects.comfy import files
from handler.api.dialects.comfy.graph import read
from handler.api.dialects.comfy.plan import WAITING
from handler.catalog.models import MODELS
from handler.core.errors import GraphRefused
from handler.core.loras import Wanted
from handler.core.reading import Sizes
from handler.core.sampling import SAMPLERS, SCHEDULES


def refused(graph: Graph, model: str = "spark", **worker: Any) -> str:
    """Every node's first fault."""
    with pytest.raises(GraphRefused) as caught:
        plan(graph, model, **worker)
    return " ".join(entry["errors"][0]["details"] for entry in caught.value.answer["node_errors"].values())


def test_a_plain_request() -> None:
    asked = request(plain())
    assert (asked.prompt, asked.seed, asked.width, asked.height, asked.n) == ("a red circle", 7, 256, 256, 1)
    assert asked.sampling is not None
    assert (asked.sampling.sampler, asked.sampling.scheduler, asked.sampling.steps) == ("euler", "simple", 4)
    assert (asked.sampling.cfg, asked.sampling.denoise, asked.sampling.shift) == (1, 1, None)
    assert (asked.negative_prompt, asked.guidance_scale, asked.images, asked.loras) == (None, None, (), ())
    assert asked.reading is not None


def test_largest_seed_and_every_sampler_and_schedule() -> None:
    assert request(plain(seed=2**64 - 1)).seed == 2**64 - 1
    for name in SAMPLERS:
        assert request(plain(sampler_name=name)).sampling.sampler == name  # type: ignore[union-attr]
    for name in SCHEDULES:
        assert request(plain(scheduler=name)).sampling.scheduler == name  # type: ignore[union-attr]


def test_a_negative_prompt_is_one_where_there_is_guidance() -> None:
    asked = request(plain("sd_xl_base_1.0.safetensors", cfg=7.5), "sdxl")
    assert (asked.negative_prompt, asked.sampling.cfg) == ("blurry", 7.5)  # type: ignore[union-attr]
    graph = plain(cfg=7.5, negative=["8", 0]) | {"8": node("ConditioningZeroOut", conditioning=["2", 0])}
    assert request(graph).reading.zeros  # type: ignore[union-attr]
    graph["5"]["inputs"]["cfg"] = 1
    assert not request(graph).reading.zeros  # type: ignore[union-attr]
    graph["3"]["inputs"]["text"] = ""
    assert request(plain(cfg=2) | {"3": graph["3"]}).negative_prompt == ""


def test_an_empty_prompt_is_drawn() -> None:
    graph = plain()
    graph["2"]["inputs"]["text"] = ""
    assert request(graph).prompt == ""


def test_a_batch_is_so_many_pictures_of_one_seed() -> None:
    graph = plain()
    graph["4"]["inputs"]["batch_size"] = 4
    assert request(graph).n == 4
    graph["4"]["inputs"]["batch_size"] = 5
    assert "batch_size is 5; at most 4" in refused(graph)


@pytest.mark.parametrize("kind", ["EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage"])
def test_sizes_come_to_whole_cells(kind: str) -> None:
    cell = 16 if "Flux2" in kind else 8
    asked = request(plain() | {"4": node(kind, width=271, height=135, batch_size=1)})
    assert (asked.width, asked.height) == (271 // cell * cell, 135 // cell * cell)


def test_sizes_have_limits() -> None:
    assert "2056x256" in refused(plain() | {"4": node("EmptyLatentImage", width=2056, height=256, batch_size=1)})


def flux(unet: str = "flux1-dev.safetensors", **inputs: Any) -> Graph:
    """As FLUX is drawn with custom sampling."""
    return {
        "6": node("CLIPTextEncode", clip=["11", 0], text="a cat"),
        "8": node("VAEDecode", samples=["13", 0], vae=["10", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
        "10": node("VAELoader", vae_name="FLUX1/ae.safetensors"),
        "11": node("DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"),
        "12": node("UNETLoader", unet_name=unet, weight_dtype="fp8_e4m3fn"),
        "13": node(
            "SamplerCustomAdvanced",
            noise=["25", 0],
            guider=["22", 0],
            sampler=["16", 0],
            sigmas=["17", 0],
            latent_image=["27", 0],
        ),
        "16": node("KSamplerSelect", sampler_name="euler"),
        "17": node("BasicScheduler", model=["30", 0], scheduler="beta", steps=20, denoise=1.0),
        "22": node("BasicGuider", model=["30", 0], conditioning=["26", 0]),
        "25": node("RandomNoise", noise_seed=2**63),
        "26": node("FluxGuidance", conditioning=["6", 0], guidance=2.5),
        "27": node("EmptySD3LatentImage", width=1024, height=512, batch_size=1),
        "30": node("ModelSamplingFlux", model=["12", 0], max_shift=1.15, base_shift=0.5, width=1024, height=1024),
    } | inputs


def test_flux_with_custom_sampling() -> None:
    asked = request(flux(), "flux-dev")
    assert (asked.prompt, asked.seed, asked.guidance_scale) == ("a cat", 2**63, 2.5)
    sampling = asked.sampling
    assert sampling is not None
    assert (sampling.scheduler, sampling.steps, sampling.cfg, sampling.custom) == ("beta", 20, 1, True)
    assert (sampling.shift_type, sampling.shift) == ("exponential", pytest.approx(1.15))
    [note] = plan(flux(), "flux-dev").notes
    assert "KINDLING_PRECISION" in note


def test_guidance_is_told_to_who_listens() -> None:
    silent = flux()
    silent["22"]["inputs"]["conditioning"] = ["6", 0]
    assert request(silent, "flux-dev").guidance_scale == 3.5
    schnell = flux("flux1-schnell.safetensors")
    assert request(schnell, "flux-schnell").guidance_scale is None
    assert any("FluxGuidance changes nothing" in note for note in plan(schnell, "flux-schnell").notes)


def test_guidance_that_is_another_in_comfyui_is_noted() -> None:
    own = "qwen-image.safetensors"
    guided, plainly = (plan(plain(own, cfg=cfg), "qwen-image").notes for cfg in (2.5, 1.0))
    assert [note for note in guided if "Node 5 (KSampler): a guided step of Qwen-Image" in note]
    assert not [note for note in plainly if "a guided step" in note]


def test_a_shift_is_of_a_flow() -> None:
    graph = plain(model=["8", 0]) | {"8": node("ModelSamplingAuraFlow", model=["1", 0], shift=100)}
    assert request(graph).sampling.shift == 100  # type: ignore[union-attr]
    graph["1"]["inputs"]["ckpt_name"] = "sd_xl_base_1.0.safetensors"
    assert "is no flow" in refused(graph, "sdxl")


def turbo(model: str = "sd_xl_turbo_1.0_fp16.safetensors", steps: int = 1) -> Graph:
    graph = plain(model)
    links = {name: graph["5"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    custom = {"add_noise": True, "noise_seed": 0, "cfg": 1, "sampler": ["8", 0], "sigmas": ["9", 0]}
    graph["5"] = node("SamplerCustom", **links, **custom)
    graph["8"] = node("KSamplerSelect", sampler_name="euler_ancestral")
    graph["9"] = node("SDTurboScheduler", model=["1", 0], steps=steps, denoise=1)
    return graph


def test_sdxl_turbo() -> None:
    asked = request(turbo(), "sdxl-turbo").sampling
    assert asked is not None
    assert asked.sigmas == (pytest.approx(14.6146, abs=1e-4), 0)
    four = request(turbo(steps=4), "sdxl-turbo").sampling
    assert four is not None
    assert four.sigmas == (*(pytest.approx(level(time), rel=1e-5) for time in (999, 899, 799, 699)), 0)
    assert "is a flow" in refused(turbo("spark.safetensors"))


def level(time: int) -> float:
    """Of Stable Diffusion's noise, by its scheduler in diffusers."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    kept = float(schedule.alphas_cumprod[time])
    return math.sqrt((1 - kept) / kept)


def test_schedules_that_are_numbers() -> None:
    graph = turbo("spark.safetensors")
    graph["9"] = node("ManualSigmas", sigmas="1.0, 0.5,0.25 0")
    assert request(graph).sampling.sigmas == (1, 0.5, 0.25, 0)  # type: ignore[union-attr]
    graph["9"] = node("ManualSigmas", sigmas="0, 1")
    assert "that fall" in refused(graph)
    graph["9"] = node("KarrasScheduler", steps=3, sigma_max=8, sigma_min=1, rho=1)
    assert request(graph).sampling.sigmas == (8, 4.5, 1, 0)  # type: ignore[union-attr]
    graph["9"] = node("ExponentialScheduler", steps=3, sigma_max=4, sigma_min=1)
    assert request(graph).sampling.sigmas == (4, 2, 1, 0)  # type: ignore[union-attr]


def test_flux2s_own_schedule() -> None:
    """At 1024x1024 and 4 steps, as diffusers' `compute_empirical_mu` has it: 2.0257."""
    graph = turbo("spark.safetensors")
    graph["9"] = node("Flux2Scheduler", steps=4, width=1024, height=1024)
    found = request(graph).sampling.sigmas  # type: ignore[union-attr]
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    shift = math.exp(compute_empirical_mu(4096, 4))
    assert found == (1, *(pytest.approx(shift * t / (shift * t + 1 - t)) for t in (0.75, 0.5, 0.25)), 0)


def test_parts_of_a_schedule() -> None:
    graph = turbo("spark.safetensors")
    graph["9"] = node("SplitSigmas", sigmas=["10", 0], step=3)
    graph["10"] = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=8, denoise=1)
    assert (request(graph).sampling.start, request(graph).sampling.end) == (0, 3)  # type: ignore[union-attr]
    graph["5"]["inputs"]["sigmas"] = ["9", 1]
    assert (request(graph).sampling.start, request(graph).sampling.taken) == (3, 5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sigmas", "left"),
    [
        (node("BasicScheduler", model=["1", 0], scheduler="simple", steps=8, denoise=1), {"start": 0, "end": 3}),
        (node("ManualSigmas", sigmas="9, 7, 5, 3, 1, 0"), {"sigmas": (9, 7, 5, 3)}),
    ],
)
def test_a_part_that_ends_in_noise_leaves_it_there(sigmas: Any, left: dict[str, Any]) -> None:
    """Its second output is what it headed for: a last step to 0. No other sampler goes on from the first."""
    graph = turbo("spark.safetensors")
    graph |= {"9": node("SplitSigmas", sigmas=["10", 0], step=3), "10": sigmas}
    sampling = request(graph).sampling
    assert sampling is not None
    assert (sampling.leftover_noise, sampling.model_dump().items() >= left.items()) == (True, True)
    [decode] = [key for key, made in graph.items() if made["class_type"] == "VAEDecode"]
    graph[decode]["inputs"]["samples"] = ["5", 1]
    headed = request(graph).sampling
    assert headed is not None
    assert (headed.leftover_noise, headed.sigmas) == (False, (9, 7, 5, 0) if "sigmas" in left else ())
    graph[decode]["inputs"]["samples"] = ["25", 0]
    graph["25"] = {**graph["5"], "inputs": graph["5"]["inputs"] | {"latent_image": ["5", 0], "sigmas": ["9", 1]}}
    assert "sample once, to the last step" in refused(graph)
    graph[decode]["inputs"]["samples"] = ["5", 0]
    graph["9"]["inputs"]["step"] = 10
    assert request(graph).sampling.leftover_noise is False  # type: ignore[union-attr]
    graph["5"]["inputs"]["sigmas"] = ["9", 1]
    assert "no step is taken" in refused(graph)


def test_a_size_by_a_choice_of_sdxls() -> None:
    graph = plain("sd_xl_base_1.0.safetensors", cfg=5)
    sides = {"width_override": 0, "height_override": 0}
    picker = node("SDXLEmptyLatentSizePicker+", resolution="1152x896 (1.29)", batch_size=1, **sides)
    graph["4"] = picker
    assert (request(graph, "sdxl").width, request(graph, "sdxl").height) == (1152, 896)
    picker["inputs"]["height_override"] = 512
    assert (request(graph, "sdxl").width, request(graph, "sdxl").height) == (1152, 512)
    picker["inputs"]["resolution"] = "large"
    assert "should begin with two sides" in refused(graph, "sdxl")


def test_the_advanced_sampler() -> None:
    graph = plain()
    graph["5"] = node(
        "KSamplerAdvanced",
        **{name: value for name, value in graph["5"]["inputs"].items() if name not in ("seed", "denoise")},
        add_noise="enable",
        noise_seed=9,
        start_at_step=1,
        end_at_step=3,
        return_with_leftover_noise="enable",
    )
    sampling = request(graph).sampling
    assert sampling is not None
    assert (sampling.start, sampling.end, sampling.add_noise, sampling.leftover_noise) == (1, 3, True, True)
    graph["5"]["inputs"] |= {"add_noise": "disable", "start_at_step": 0, "end_at_step": 10000}
    sampling = request(graph).sampling
    assert sampling is not None
    assert (sampling.start, sampling.end, sampling.add_noise, sampling.leftover_noise) == (0, None, False, False)


def test_more_steps_than_a_model_is_made_for_are_noted() -> None:
    [note] = plan(plain(steps=20)).notes
    assert "20 steps are more than the 8 that spark is made for" in note


def second(latent: list[Any], **nodes: Any) -> Graph:
    """What 5 draws is drawn anew by 15, from a latent, and saved by 17."""
    graph = plain()
    graph["15"] = node("KSampler", **{**graph["5"]["inputs"], "latent_image": latent, "denoise": 0.5, "seed": 8})
    graph["16"] = node("VAEDecode", samples=["15", 0], vae=["1", 2])
    graph["17"] = node("SaveImage", images=["16", 0], filename_prefix="second")
    return graph | nodes


def test_a_second_pass_waits_for_the_first() -> None:
    scaled = node("ImageScaleBy", image=["6", 0], upscale_method="nearest-exact", scale_by=1.52)
    graph = second(["11", 0], **{"10": scaled, "11": node("VAEEncode", pixels=["10", 0], vae=["1", 2])})
    found = plan(graph)
    first, last = found.outputs
    assert (first.before, found.notes) == (None, ())
    assert last.before is not None
    assert (last.before.request, last.before.sampler, last.before.before) == (first.request, "5", None)
    assert (last.request.images, last.request.seed, last.request.width) == ((WAITING,), 8, 384)
    picture = np.zeros((256, 256, 3), np.uint8)
    for change in last.before.after:
        picture = change(picture)
    assert picture.shape == (384, 384, 3)
    assert (last.sampler, last.after, last.order[-3:]) == ("15", (), ("15", "16", "17"))


def test_a_second_pass_without_a_picture_between() -> None:
    larger = node("LatentUpscaleBy", samples=["5", 0], upscale_method="bislerp", scale_by=1.5)
    found = plan(second(["10", 0], **{"10": larger}))
    assert found.outputs[1].request.width == 384
    assert len(found.notes) == 2
    direct = plan(second(["5", 0])).outputs[1]
    assert direct.before is not None
    assert (direct.before.after, direct.request.width) == ((), 256)
    again = second(["5", 0])
    again["18"] = node("SetLatentNoiseMask", samples=["5", 0], mask=["19", 0])
    again["19"] = node("SolidMask", value=1, width=64, height=64)
    again["15"]["inputs"]["latent_image"] = ["18", 0]
    assert plan(again).outputs[1].request.mask


def test_what_a_second_pass_cannot_start_from() -> None:
    graph = second(["5", 0])
    graph["4"]["inputs"]["batch_size"] = 2
    del graph["7"]
    assert "set batch_size to 1" in refused(graph)
    graph = second(["5", 0])
    del graph["7"]
    for n in range(20, 24):
        graph[f"{n}"] = node(
            "KSampler", **{**graph["15"]["inputs"], "latent_image": [f"{n - 1}" if n > 20 else "5", 0]}
        )
    graph["15"]["inputs"]["latent_image"] = ["23", 0]
    assert "more than 4 times" in refused(graph)


def test_noise_is_not_left_for_another_sampler() -> None:
    graph = second(["5", 0])
    advanced = {name: value for name, value in graph["5"]["inputs"].items() if name not in ("seed", "denoise")}
    part = {"add_noise": "enable", "noise_seed": 1, "start_at_step": 0, "end_at_step": 2}
    graph["5"] = node("KSamplerAdvanced", **advanced, **part, return_with_leftover_noise="enable")
    assert "sample once, to the last step" in plan(graph).node_errors["15"]["errors"][0]["details"]
    graph["15"]["inputs"]["latent_image"] = ["11", 0]
    graph["11"] = node("VAEEncode", pixels=["6", 0], vae=["1", 2])  # what was decoded is a picture like any other
    assert plan(graph).node_errors == {}


@pytest.mark.parametrize(("denoise", "high", "low"), [(0.02, "", ""), (0.5, (0, 4), (4, None)), (1, "", (0, None))])
def test_a_share_of_the_steps(denoise: float, high: Any, low: Any) -> None:
    """As ComfyUI's `sigmas[:-left]` and `sigmas[-(left + 1):]`; of none left, the first is empty."""
    graph = turbo("spark.safetensors")
    graph["9"] = node("SplitSigmasDenoise", sigmas=["10", 0], denoise=denoise)
    graph["10"] = node("BasicScheduler", model=["1", 0], scheduler="simple", steps=8, denoise=1)
    for half, wanted in enumerate((high, low)):
        graph["5"]["inputs"]["sigmas"] = ["9", half]
        if wanted:
            sampling = request(graph).sampling
            assert sampling is not None
            assert (sampling.start, sampling.end) == wanted
        else:
            assert "no step is taken" in refused(graph)


def test_prompts_of_single_encoders_and_sizes() -> None:
    sizes = {"width": 4096, "height": 4096, "crop_w": 1, "crop_h": 2, "target_width": 1024, "target_height": 768}
    graph = plain("sd_xl_base_1.0.safetensors", cfg=5)
    graph["2"] = node("CLIPTextEncodeSDXL", clip=["8", 0], text_g="a cat", text_l="fur", **sizes)
    graph["3"]["inputs"]["clip"] = ["8", 0]
    graph["8"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)
    reading = request(graph, "sdxl").reading
    assert reading is not None
    assert (reading.prompts.g, reading.prompts.l, reading.sizes) == ("a cat", "fur", Sizes(**sizes))
    assert (reading.clip_skip, reading.negative_prompts.g) == (-2, None)
    graph["3"]["inputs"]["clip"] = ["1", 1]
    assert "different layers" in refused(graph, "sdxl")


def test_prompts_of_flux_and_sd3() -> None:
    graph = flux()
    graph["26"] = node("CLIPTextEncodeFlux", clip=["11", 0], clip_l="fur", t5xxl="a cat", guidance=4)
    asked = request(graph, "flux-dev")
    assert asked.reading is not None
    assert (asked.prompt, asked.reading.prompts.l, asked.guidance_scale) == ("a cat", "fur", 4)


@pytest.mark.parametrize(
    ("texts", "padding", "noted"),
    [
        (("a cat", "a cat", "a cat"), "none", False),
        (("a cat", "", "a cat"), "none", False),
        (("a cat", "a cat", ""), "none", True),
        (("", "", "a cat"), "none", True),
        (("a cat", "a cat", ""), "empty_prompt", False),
    ],
)
def test_an_empty_text_of_sd3_that_is_padded_all_the_same_is_noted(
    texts: tuple[str, ...], padding: str, noted: bool
) -> None:
    graph = plain("sd3.5_large.safetensors")
    said = dict(zip(("clip_l", "clip_g", "t5xxl"), texts, strict=True))
    graph["2"] = node("CLIPTextEncodeSD3", clip=["1", 1], **said, empty_padding=padding)
    assert any("empty_padding" in note for note in plan(graph, "sd3.5-large").notes) == noted


def test_loras() -> None:
    names = ("styles/Ink.safetensors", "wash.safetensors")
    graph = plain(model=["8", 0])
    graph["8"] = node(
        "LoraLoader", model=["9", 0], clip=["9", 1], lora_name="ink.safetensors", strength_model=0.5, strength_clip=0.5
    )
    graph["9"] = node(
        "LoraLoader",
        model=["1", 0],
        clip=["1", 1],
        lora_name="styles\\Ink.safetensors",
        strength_model=0.25,
        strength_clip=0.25,
    )
    graph["2"]["inputs"]["clip"] = graph["3"]["inputs"]["clip"] = ["8", 1]
    assert request(graph, loras=names).loras == (Wanted("styles/Ink", 0.75),)
    graph["8"]["inputs"] |= {"lora_name": "wash.safetensors", "strength_model": 0, "strength_clip": 0}
    assert request(graph, loras=names).loras == (Wanted("styles/Ink", 0.25),)
    assert "no LoRA 'styles\\Ink" in refused(graph, loras=("wash.safetensors",))


def test_loras_as_rgthree_has_them() -> None:
    graph = plain(model=["8", 0])
    ink = {"on": True, "lora": "ink.safetensors", "strength": 0.5}
    off = {"on": False, "lora": "nobody.safetensors", "strength": 1}
    graph["8"] = node("Power Lora Loader (rgthree)", model=["1", 0], clip=["1", 1], lora_1=ink, lora_2=off, header="x")
    graph["2"]["inputs"]["clip"] = graph["3"]["inputs"]["clip"] = ["8", 1]
    assert request(graph, loras=("ink.safetensors",)).loras == (Wanted("ink", 0.5),)


def test_loras_of_the_model_alone_and_of_the_text_alone() -> None:
    graph = plain(model=["8", 0]) | {
        "8": node("LoraLoaderModelOnly", model=["1", 0], lora_name="ink", strength_model=1)
    }
    assert request(graph, loras=("ink.safetensors",)).loras == (Wanted("ink", 1.0, 0.0),)
    graph = plain() | {
        "8": node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name="ink", strength_model=1, strength_clip=0.5)
    }
    graph["2"]["inputs"]["clip"] = graph["3"]["inputs"]["clip"] = ["8", 1]
    assert request(graph, loras=("ink.safetensors",)).loras == (Wanted("ink", 0.0, 0.5),)
    graph["5"]["inputs"] |= {"model": ["8", 0], "cfg": 3}
    assert request(graph, loras=("ink.safetensors",)).loras == (Wanted("ink", 1.0, 0.5),)
    graph["3"]["inputs"]["clip"] = ["1", 1]
    assert "different LoRAs" in refused(graph, loras=("ink.safetensors",))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("flux1-dev-fp8.safetensors", "flux-dev"),
        ("FLUX1\\flux1-dev-Q8_0.gguf", "flux-dev"),
        ("flux1-schnell-Q3_K_S.gguf", "flux-schnell"),
        ("v1-5-pruned-emaonly-fp16.safetensors", "sd1.5"),
        ("v1-5-pruned-emaonly.ckpt", "sd1.5"),
        ("SD_XL_base_1.0.safetensors", "sdxl"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo"),
        ("sdxl_lightning_4step_unet.pth", "sdxl-lightning"),
        ("z_image_turbo_bf16.safetensors", "z-image-turbo"),
        ("qwen_image_2512_fp8_e4m3fn.safetensors", "qwen-image"),
        ("flux-2-klein-4b-fp8.safetensors", "flux2-klein"),
        ("flux2_dev_fp8mixed.safetensors", "flux2-dev"),
        ("spark.safetensors", "spark"),
    ],
)
def test_names_of_files_mean_rows(name: str, row: str) -> None:
    assert files.table()["models"][files.stem(name)] == row
    assert request(plain(name), row).model is None


def test_every_row_has_a_name_of_its_own() -> None:
    assert set(files.table()["models"].values()) <= MODELS.keys()
    for row in MODELS:
        read(plain(f"{row}.safetensors"), served(row), load)


def test_what_is_not_served_says_what_would() -> None:
    assert "KINDLING_MODEL=sdxl." in refused(plain("sd_xl_base_1.0.safetensors"))
    told = refused(plain("dreamshaper_8.safetensors"), "sd1.5")
    assert "'dreamshaper_8.safetensors' is not served: put it on the volume" in told
    assert "KINDLING_WEIGHTS=dreamshaper_8.safetensors" in told
    there = refused(plain("dreamshaper_8.safetensors"), "sd1.5", checkpoints=("a/dreamshaper_8.safetensors",))
    assert "it is on the volume" in there
    assert "flux-2-klein-4b" in refused(plain("flux-2-klein-9b-fp8.safetensors"), "flux2-klein")


def test_a_persons_own_file_is_what_the_worker_serves() -> None:
    weights = ("sdxl/dreamshaper_8.safetensors",)
    assert request(plain("dreamshaper_8.safetensors"), "sd1.5", weights=weights)
    told = refused(plain("v1-5-pruned-emaonly.safetensors"), "sd1.5", weights=weights)
    assert "draws with sd1.5 from sdxl/dreamshaper_8.safetensors" in told
    other = plan(plain("flux1-dev-fp8.safetensors"), "flux-dev", weights=("flux1-dev-Q4_0.gguf",))
    assert "flux1-dev-Q4_0.gguf" in other.notes[0]
    assert request(plain("flux1-dev.safetensors"), "flux-dev", weights=("t5xxl_fp8_e4m3fn.safetensors",))


def test_text_encoders_and_autoencoders_are_the_rows_own() -> None:
    graph = flux()
    graph["10"]["inputs"]["vae_name"] = "sdxl_vae.safetensors"
    assert "no autoencoder of flux-dev" in refused(graph, "flux-dev")
    assert request(graph, "flux-dev", vae="vae/sdxl_vae.safetensors")
    graph = flux()
    graph["11"]["inputs"]["clip_name1"] = "umt5_xxl.safetensors"
    assert "no text encoder of flux-dev" in refused(graph, "flux-dev")


def test_text_encoders_of_another_family_are_refused() -> None:
    graph = plain()
    graph["8"] = node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    graph["2"]["inputs"]["clip"] = ["8", 1]
    assert "the text encoders of sdxl, not of spark" in refused(graph)
    lightning = plain("sd_xl_base_1.0.safetensors", model=["8", 0])
    lightning["8"] = node("UNETLoader", unet_name="sdxl_lightning_4step_unet.safetensors")
    assert request(lightning, "sdxl-lightning")


@pytest.mark.parametrize(
    ("kind", "inputs", "expected"),
    [
        ("PrimitiveString", {"value": "a cat"}, "a cat"),
        ("Text Multiline", {"text": "a cat"}, "a cat"),
        ("Text Multiline", {"text": "# in the day\na cat\n  # a dog"}, "a cat"),
        ("Text _O", {"text": "a cat"}, "a cat"),
        ("TextGenerate", {"clip": ["1", 1], "prompt": "a cat", "max_length": 9, "sampling_mode": "off"}, "a cat"),
        ("StringConcatenate", {"string_a": "a", "string_b": "cat", "delimiter": " "}, "a cat"),
        ("StringReplace", {"string": "a dog", "find": "dog", "replace": "cat"}, "a cat"),
        ("StringTrim", {"string": " a cat ", "mode": "Both"}, "a cat"),
        ("CaseConverter", {"string": "A CAT", "mode": "lowercase"}, "a cat"),
        ("StringSubstring", {"string": "a cat!", "start": 0, "end": 5}, "a cat"),
        ("Text Concatenate", {"delimiter": " ", "clean_whitespace": "true", "text_a": " a", "text_b": "cat"}, "a cat"),
        ("PreviewAny", {"source": "a cat"}, "a cat"),
    ],
)
def test_texts(kind: str, inputs: dict[str, Any], expected: str) -> None:
    graph = plain() | {"8": node(kind, **inputs)}
    graph["2"]["inputs"]["text"] = ["8", 0]
    assert plan(graph).outputs[0].request.prompt == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/16", 64), ("a*16 - b", 16380), ("max(a, b) // 3", 341), ("round(a / 3)", 341), ("-a + 2048", 1024)],
)
def test_sums(text: str, expected: int) -> None:
    graph = plain() | {"8": node("SimpleMath+", value=text, a=1024, b=4), "9": node("Seed (rgthree)", seed=["8", 0])}
    graph["5"]["inputs"]["seed"] = ["9", 0]
    assert request(graph).seed == expected


@pytest.mark.parametrize(
    "text", ["__import__('os')", "a.b", "9**9**9", "(" * 150, "a if a else b", "1/0", "'a'*9", "a" * 300]
)
def test_what_is_no_sum_is_never_executed(text: str) -> None:
    graph = plain(seed=["8", 0]) | {"8": node("SimpleMath+", value=text, a=1)}
    assert "cannot be computed" in refused(graph)


@pytest.mark.parametrize(("slot", "expected"), [(0, "a"), (1, "b"), (3, "")])
def test_a_class_that_gives_several_texts(slot: int, expected: str) -> None:
    graph = plain() | {"8": node("Text String", text="a", text_b="b", text_c="", text_d="")}
    graph["2"]["inputs"]["text"] = ["8", slot]
    assert request(graph).prompt == expected


@pytest.mark.parametrize("slot", range(4))
def test_every_output_of_wass_seed_is_it(slot: int) -> None:
    assert request(plain(seed=["8", slot]) | {"8": node("Seed", seed=9)}).seed == 9
    assert "not there" in refused(plain(seed=["8", 4]) | {"8": node("Seed", seed=9)})


def test_classes_that_pass_on_what_is_linked_to_them() -> None:
    graph = plain(model=["8", 2])
    graph["8"] = node("VRAM_Debug", empty_cache=True, gc_collect=True, unload_all_models=False, model_pass=["1", 0])
    graph["9"] = node("easy showAnything", anything=["10", 0])
    graph["10"] = node("VRAM_Debug", empty_cache=True, any_input="a cat")
    graph["2"]["inputs"]["text"] = ["9", 0]
    assert request(graph).prompt == "a cat"


def test_what_nothing_leads_to_is_refused() -> None:
    graph = plain(model=["8", 2]) | {"8": node("VRAM_Debug", empty_cache=True)}
    assert "model is linked to output 2 of node 8, to which nothing leads" in refused(graph)
    graph = plain() | {"8": node("VRAM_Debug", empty_cache=True)}
    graph["2"]["inputs"]["text"] = ["8", 0]
    assert "text is linked to output 0 of node 8, to which nothing leads" in refused(graph)


@pytest.mark.parametrize(
    ("kind", "name", "asked", "noted"),
    [
        ("Image Save", "extension", "webp", "webp is not offered"),
        ("Image Save", "extension", "PNG", ""),
        ("Save Image w/Metadata", "extension", "jpeg", "jpeg is not offered"),
        ("SaveImageExtended", "output_ext", ".avif", "avif is not offered"),
        ("SaveImageKJ", "file_extension", ".png", ""),
    ],
)
def test_what_saves_another_format_saves_a_png_and_says_so(kind: str, name: str, asked: str, noted: str) -> None:
    prefix = {"filename" if "Metadata" in kind else "filename_prefix": "mine"}
    graph = plain() | {"7": node(kind, images=["6", 0], **{name: asked}, **prefix)}
    made = plan(graph | {"8": node("PreviewImage", images=["7", 0])})
    assert [output.prefix for output in made.outputs] == ["mine", "ComfyUI_temp"]
    assert bool([note for note in made.notes if "the picture is a PNG" in note]) == bool(noted)
    assert noted in " ".join(made.notes)


def test_t5s_padding_is_the_models_own() -> None:
    graph = flux()
    graph["40"] = node("T5TokenizerOptions", clip=["11", 0], min_padding=1, min_length=0)
    graph["6"]["inputs"]["clip"] = ["40", 0]
    made = plan(graph, "flux-dev")
    assert made.outputs[0].request.prompt == "a cat"
    assert any("change nothing" in note for note in made.notes)


def guided(positive: float | None, negative: float | None) -> Graph:
    """FLUX with two prompts, each with its guidance."""
    graph = flux() | {"7": node("CLIPTextEncode", clip=["11", 0], text="blurry")}
    for name, encoder, guidance in (("26", "6", positive), ("28", "7", negative)):
        told = node("FluxGuidance", conditioning=[encoder, 0], guidance=guidance)
        graph[name] = told if guidance is not None else node("Reroute", value=[encoder, 0])
    graph["22"] = node("CFGGuider", model=["30", 0], positive=["26", 0], negative=["28", 0], cfg=3)
    return graph


@pytest.mark.parametrize(
    ("positive", "negative", "told"),
    [(1.0, 5.0, "1, and not 5"), (1.0, None, "1, and not 3.5"), (3.5, None, ""), (2.0, 2.0, "")],
)
def test_a_negative_prompt_of_another_guidance_is_noted(positive: float, negative: float | None, told: str) -> None:
    made = plan(guided(positive, negative), "flux-dev")
    assert made.outputs[0].request.guidance_scale == positive
    assert len([note for note in made.notes if "guidance is the positive" in note]) == bool(told)
    assert told in " ".join(made.notes)


def test_a_size_that_is_cut_is_noted() -> None:
    graph = flux()
    assert not [note for note in plan(graph, "flux-dev").notes if "cut" in note]
    graph["27"] = node("EmptySD3LatentImage", width=1080, height=1920, batch_size=1)
    assert [note for note in plan(graph, "flux-dev").notes if "1080x1920 is drawn as 1088x1920 and cut" in note]


def test_what_a_model_cannot_do_is_refused_before_it_waits() -> None:
    klein = plain("flux-2-klein-4b.safetensors", cfg=5)
    assert "set cfg to 1" in refused(klein, "flux2-klein")
    skipping = plain("z_image_turbo_bf16.safetensors", cfg=1)
    skipping["8"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)
    skipping["2"]["inputs"]["clip"] = ["8", 0]
    assert "has no CLIP" in refused(skipping, "z-image-turbo")
    skipping["8"]["inputs"]["stop_at_clip_layer"] = -1
    assert request(skipping, "z-image-turbo").reading.clip_skip is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("slot", "side"), [*enumerate([320, 192] * 3)])
def test_wass_size_has_six_outputs(slot: int, side: int) -> None:
    graph = plain() | {"8": node("Image Size to Number", image=["10", 0])}
    graph["10"] = node("EmptyImage", width=320, height=192, batch_size=1, color=0)
    graph["4"]["inputs"]["width"] = ["8", slot]
    assert request(graph).width == side


def test_efficiency_nodes_lose_nothing_that_is_linked_to_them() -> None:
    graph = plain()
    graph["5"] = node("KSampler (Efficient)", **graph["5"]["inputs"], script=["8", 0])
    graph["5"]["inputs"] |= {"preview_method": "none", "vae_decode": "true", "optional_vae": ["1", 2]}
    graph["7"]["inputs"]["images"] = ["5", 5]
    graph["8"] = node("HighRes-Fix Script", upscale_by=1.5)
    with pytest.raises(GraphRefused) as caught:
        plan(graph)
    assert "scripts of the Efficiency Nodes are not offered" in str(caught.value.answer)
    loader: dict[str, Any] = {
        "ckpt_name": "spark.safetensors", "vae_name": "Baked VAE", "clip_skip": -1, "lora_name": "None",
        "lora_model_strength": 1.0, "lora_clip_strength": 1.0, "positive": "a cat", "negative": "",
        "token_normalization": "none", "weight_interpretation": "comfy", "empty_latent_width": 256,
        "empty_latent_height": 256, "batch_size": 1, "cnet_stack": ["8", 0],
    }  # fmt: skip
    graph = plain(model=["1", 0], positive=["1", 1], negative=["1", 2], latent_image=["1", 3])
    graph["1"] = node("Efficient Loader", **loader)
    graph["6"]["inputs"]["vae"] = ["1", 4]
    graph["8"] = node("Control Net Stacker", strength=1.0)
    with pytest.raises(GraphRefused) as caught:
        plan(graph)
    assert "ControlNet is not offered" in str(caught.value.answer)


def test_efficiency_nodes() -> None:
    graph = {
        "1": node("LoRA Stacker", input_mode="simple", lora_count=1, lora_name_1="ink.safetensors", lora_wt_1=0.5),
        "2": node(
            "Eff. Loader SDXL",
            base_ckpt_name="sd_xl_base_1.0.safetensors",
            base_clip_skip=-2,
            refiner_ckpt_name="None",
            vae_name="Baked VAE",
            positive="a cat",
            negative="blurry",
            token_normalization="none",
            weight_interpretation="comfy",
            empty_latent_width=1024,
            empty_latent_height=768,
            batch_size=1,
            lora_stack=["1", 0],
        ),
        "3": node(
            "KSampler SDXL (Eff.)",
            sdxl_tuple=["2", 0],
            latent_image=["2", 1],
            optional_vae=["2", 2],
            noise_seed=5,
            steps=4,
            cfg=1.5,
            sampler_name="lcm",
            scheduler="sgm_uniform",
            start_at_step=0,
            refine_at_step=-1,
            preview_method="none",
            vae_decode="true",
        ),
        "4": node("SaveImage", images=["3", 3], filename_prefix="x"),
    }
    asked = request(graph, "sdxl", loras=("ink.safetensors",))
    assert (asked.prompt, asked.negative_prompt, asked.seed, asked.height) == ("a cat", "blurry", 5, 768)
    assert asked.loras == (Wanted("ink", 0.5),)
    assert asked.reading is not None
    assert asked.reading.clip_skip == -2
    graph["2"]["inputs"]["refiner_ckpt_name"] = "sd_xl_refiner_1.0.safetensors"
    assert "refiner is not offered" in refused(graph, "sdxl", loras=("ink.safetensors",))
