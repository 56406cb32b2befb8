"""Which files of the hub's repositories are needed: choices from listings, without a hub."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from handler import MODELS
from handler.catalog.parts import Graft
from handler.catalog.spec import ModelSpec
from handler.core.errors import FetchFailed
from handler.volume.files import Item, choose_files, home, model_items, vae_items
from handler.volume.hub import Repository

FLUX = """
LICENSE.md model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors
text_encoder_2/config.json text_encoder_2/model-00001-of-00002.safetensors
text_encoder_2/model-00002-of-00002.safetensors text_encoder_2/model.safetensors.index.json
tokenizer/merges.txt tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/spiece.model
tokenizer_2/tokenizer.json transformer/config.json transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()  # noqa: SIM905
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
INDEX: dict[str, Any] = {"_class_name": "FluxPipeline", **{part: ["library", "Class"] for part in PARTS}}
UNET: dict[str, Any] = {"unet": ["diffusers", "U"]}
WHOLE, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
SHARDED = [
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00002-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
]
FP16_SHARDED = [
    "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
]
LIGHTNING = MODELS["sdxl-lightning"]


def own(spec: ModelSpec) -> Repository:
    return Repository(spec.repository, spec.revision)


def unet(names: Collection[str], variant: str = "") -> dict[str, str]:
    """What is chosen of a unet with these files beside its config."""
    chosen = choose_files(["unet/config.json", *(f"unet/{name}" for name in names)], UNET, variant)
    assert chosen.pop("unet/config.json") == "unet/config.json"
    return {path.removeprefix("unet/"): file.removeprefix("unet/") for path, file in chosen.items()}


@pytest.mark.parametrize(
    "left", ["README.md", "ae.safetensors", "flux1-dev.safetensors", "dev_grid.jpg", ".gitattributes"]
)
def test_what_flux_needs(left: str) -> None:
    assert choose_files([*FLUX, left], INDEX) == {name: name for name in FLUX}


def test_only_components_and_plain_safetensors_come() -> None:
    index = {"_class_name": "X", "flag": True, "gone": [None, None], **UNET, "../up": ["a", "b"]}
    plain = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    left = """
        unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin unet/model.onnx unet/run.py
        unet/diffusion_pytorch_model.safetensors.index.fp16.json unet/pytorch_model.bin.index.json unet/old/config.json
        unet/flax_model.msgpack gone/config.json other/config.json x.ckpt ../up/config.json config.json
    """.split()  # noqa: SIM905
    assert choose_files([*plain, *left], index) == {name: name for name in plain}


def test_a_processor_has_templates_and_no_weights() -> None:
    files = ["tokenizer/chat_template.jinja", "tokenizer/processor_config.json", "tokenizer/tokenizer.json"]
    left = ["chat_template.jinja", "tokenizer/more/other.jinja"]
    assert set(choose_files([*files, *left], {"tokenizer": ["transformers", "P"]})) == set(files)


@pytest.mark.parametrize("only", ["diffusion_pytorch_model.bin", "model.fp16.safetensors", "model.ckpt"])
def test_a_component_without_plain_safetensors_is_named(only: str) -> None:
    with pytest.raises(FetchFailed, match=f"'vae'.*{only}"):
        choose_files(["vae/config.json", f"vae/{only}"], {"vae": ["diffusers", "V"]})


def test_a_component_without_files_is_named() -> None:
    with pytest.raises(FetchFailed, match="'vae'"):
        choose_files(["unet/config.json"], {"vae": ["diffusers", "V"]})


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([WHOLE, FP16], {WHOLE: FP16}),
        ([*SHARDED, FP16], {WHOLE: FP16}),
        ([*SHARDED, *FP16_SHARDED], dict(zip(SHARDED, FP16_SHARDED, strict=True))),
        ([WHOLE, *FP16_SHARDED], dict(zip(SHARDED, FP16_SHARDED, strict=True))),
        (SHARDED, {name: name for name in SHARDED}),
        ([WHOLE, "diffusion_pytorch_model.fp16.bin"], {WHOLE: WHOLE}),
        ([WHOLE, FP16_SHARDED[-1]], {WHOLE: WHOLE}),
    ],
)
def test_a_variant_comes_under_plain_names_where_it_is_there(there: list[str], chosen: dict[str, str]) -> None:
    assert unet(there, "fp16") == chosen


@pytest.mark.parametrize("weights", [[WHOLE, FP16], SHARDED, ["diffusion_pytorch_model.bin"]])
def test_a_graft_takes_the_place_of_all_weights(weights: list[str]) -> None:
    base, graft = home(LIGHTNING), LIGHTNING.grafts[0]
    there = ["model_index.json", "unet/config.json", *(f"unet/{name}" for name in weights)]
    assert model_items(LIGHTNING, {base: there, own(LIGHTNING): [graft.file, "other.safetensors"]}, UNET) == [
        Item("model_index.json", base, "model_index.json"),
        Item("unet/config.json", base, "unet/config.json"),
        Item(graft.path, own(LIGHTNING), graft.file),
    ]


def test_a_graft_may_replace_one_file_or_none() -> None:
    spec = replace(LIGHTNING, grafts=(Graft("new.json", "unet/config.json"), Graft("l.safetensors", f"lora/{WHOLE}")))
    base = home(spec)
    listings = {base: ["unet/config.json", f"unet/{FP16}"], own(spec): ["new.json", "l.safetensors"]}
    assert model_items(spec, listings, UNET) == [
        Item(f"lora/{WHOLE}", own(spec), "l.safetensors"),
        Item("unet/config.json", own(spec), "new.json"),
        Item(f"unet/{WHOLE}", base, f"unet/{FP16}"),
    ]


def test_a_missing_graft_is_named() -> None:
    with pytest.raises(FetchFailed, match=r"ByteDance/SDXL-Lightning has no sdxl_lightning_4step_unet\.safetensors at"):
        model_items(LIGHTNING, {home(LIGHTNING): ["unet/config.json"], own(LIGHTNING): ["else"]}, UNET)


VAE = Repository("someone/vae", "0" * 40)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL"])
@pytest.mark.parametrize("weights", [[WHOLE], SHARDED])
def test_what_an_autoencoder_needs(kind: str, weights: list[str]) -> None:
    left = [
        "README.md",
        "sdxl_vae.safetensors",
        "model.safetensors",
        "diffusion_pytorch_model.bin",
        FP16,
        "x/config.json",
    ]
    items = vae_items(VAE, {VAE: ["config.json", *weights, *left]}, {"_class_name": kind})
    assert items == [Item(f"vae/{name}", VAE, name) for name in ["config.json", *weights]]


@pytest.mark.parametrize("config", [{}, [], {"_class_name": "UNet2DModel"}, {"_class_name": "pipelines"}])
def test_only_autoencoders_of_diffusers_can_be_loaded(config: object) -> None:
    with pytest.raises(FetchFailed, match="someone/vae is no autoencoder of diffusers"):
        vae_items(VAE, {VAE: ["config.json", WHOLE]}, config)


@pytest.mark.parametrize(
    "there", ["model.safetensors", FP16, "diffusion_pytorch_model.bin", SHARDED[-1], f"vae/{WHOLE}"]
)
def test_an_autoencoder_without_plain_safetensors_is_named(there: str) -> None:
    with pytest.raises(FetchFailed, match=r"someone/vae has no diffusion_pytorch_model\.safetensors"):
        vae_items(VAE, {VAE: ["config.json", there]}, {"_class_name": "AutoencoderKL"})
