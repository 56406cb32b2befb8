"""Images and masks of ComfyUI's graphs: before they are encoded, and after they are drawn."""

import base64
import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Graph, load, node, pixels, plain, plan, png, request, served, with_image
from PIL import Image

from handler.api.dialects.comfy import pixels as changes
from handler.api.dialects.comfy.graph import read
from handler.api.dialects.comfy.walk import Walk
from handler.api.references import upright
from handler.core.errors import GraphRefused

RGB = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
SOURCE = pixels(png(), "RGBA")
HOLE = 255 - SOURCE[..., 3]


def refused(graph: Graph, model: str = "spark") -> str:
    with pytest.raises(GraphRefused) as caught:
        plan(graph, model)
    return str(caught.value.answer)


def masked(**nodes: Any) -> Graph:
    """Inpainting: 12 sets the mask of 10 on 11."""
    graph = with_image(**nodes)
    graph.setdefault("12", node("SetLatentNoiseMask", samples=["11", 0], mask=["10", 1]))
    graph["5"]["inputs"]["latent_image"] = ["12", 0]
    return graph


def kept(graph: Graph) -> Any:
    """A request's mask: 255 where the picture stays."""
    mask = request(graph).mask
    assert mask is not None
    return pixels(mask, "RGBA")[..., 3]


@pytest.mark.parametrize("size", [(20, 91), (80, 30), (106, 74), (53, 37), (1, 1)])
@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "bicubic", "area"])
def test_scaled_as_torch_does_it(method: str, size: tuple[int, int]) -> None:
    width, height = size
    tensor = torch.from_numpy(RGB).movedim(-1, 0)[None].float()
    expected = torch.nn.functional.interpolate(tensor, (height, width), mode=method)[0].movedim(0, -1).clamp(0, 255)
    found = changes.scaled(RGB, width, height, method)
    assert found.dtype == np.uint8
    assert np.abs(found - expected.numpy()).max() <= 0.51


@pytest.mark.parametrize(("size", "shape"), [((40, 10), (13, 53)), ((10, 40), (37, 9))])
def test_a_crop_takes_the_middle(size: tuple[int, int], shape: tuple[int, int]) -> None:
    middle = changes.scaled(RGB, *size, "nearest-exact", "center")
    height, width = shape
    top, left = round((37 - height) / 2), round((53 - width) / 2)
    cut = RGB[top : top + height, left : left + width]
    assert np.array_equal(middle, changes.scaled(cut, *size, "nearest-exact"))


def test_a_picture_is_drawn_anew_in_part() -> None:
    asked = request(with_image())
    assert (asked.width, asked.height, asked.mask) == (128, 64, None)
    assert asked.sampling is not None
    assert asked.sampling.denoise == 0.5
    assert np.array_equal(pixels(asked.images[0]), SOURCE[..., :3])  # colours under what is transparent stay


def test_what_no_autoencoder_takes_is_cut_from_the_middle() -> None:
    graph = with_image(**{"13": node("ImageCrop", image=["10", 0], width=77, height=64, x=3, y=0)})
    graph["11"]["inputs"]["pixels"] = ["13", 0]
    assert np.array_equal(pixels(request(graph).images[0]), SOURCE[:, 3 + 2 : 3 + 2 + 72, :3])


def test_a_mask_is_what_alpha_leaves_out_and_transparent_where_it_is_drawn_anew() -> None:
    assert np.array_equal(kept(masked()), SOURCE[..., 3])
    assert kept(masked()).min() == 0


def test_masks_are_inverted_grown_and_made_of_channels() -> None:
    inverted = masked(**{"12": node("SetLatentNoiseMask", samples=["11", 0], mask=["13", 0])})
    inverted["13"] = node("InvertMask", mask=["10", 1])
    assert np.array_equal(kept(inverted), HOLE)
    inverted["13"] = node("LoadImageMask", image="mask.png", channel="red")
    assert np.array_equal(kept(inverted), 255 - SOURCE[..., 0])
    inverted["13"] = node("GrowMask", mask=["10", 1], expand=3, tapered_corners=False)
    expected = np.zeros_like(HOLE)
    expected[16 - 3 : 48 + 3, 32 - 3 : 64 + 3] = 255
    assert np.array_equal(kept(inverted), 255 - expected)
    inverted["13"]["inputs"] |= {"expand": -2}
    assert (kept(inverted) == 0).sum() == 28 * 28


def test_a_mask_falls_to_its_edges_as_comfyui_has_it() -> None:
    """Whose falls from the right and from below begin at the other end: its index is -0 there."""
    made = node("FeatherMask", mask=["00", 0], left=2, top=0, right=4, bottom=3)
    white = node("SolidMask", value=1, width=128, height=64)
    grey = kept(
        masked(**{"13": made, "00": white, "12": node("SetLatentNoiseMask", samples=["11", 0], mask=["13", 0])})
    )
    wanted = torch.ones(64, 128)
    for x in range(2):
        wanted[:, x] *= (x + 1) / 2
    for x in range(4):
        wanted[:, -x] *= (x + 1) / 4
    for y in range(3):
        wanted[-y, :] *= (y + 1) / 3
    assert np.array_equal(255 - grey, (255 * wanted).round().numpy().astype(np.uint8))


def test_corners_of_a_mask_are_tapered() -> None:
    dot = np.zeros((9, 9), np.uint8)
    dot[4, 4] = 255
    grown = changes.grown(dot, 2, corners=False)
    y, x = np.mgrid[:9, :9]
    assert np.array_equal(grown > 0, abs(x - 4) + abs(y - 4) <= 2)
    assert (changes.grown(dot, 2, corners=True) > 0).sum() == 25


def test_a_colour_may_be_a_batch() -> None:
    graph = with_image(**{"13": node("EmptyImage", width=64, height=64, batch_size=3, color=0)})
    graph["11"]["inputs"]["pixels"] = ["13", 0]
    assert "it encodes 3 images at once" in refused(graph)
    graph["13"]["inputs"]["batch_size"] = 1
    assert request(graph).width == 64
    graph["13"]["inputs"]["batch_size"] = 4000
    assert "it batches 4000 images" in refused(graph)


@pytest.mark.parametrize("grow", [0, 1, 6, 7])
def test_inpainting_is_grey_under_the_mask_and_the_mask_is_larger(grow: int) -> None:
    inpaint = node("VAEEncodeForInpaint", pixels=["10", 0], vae=["1", 2], mask=["10", 1], grow_mask_by=grow)
    asked = request(with_image(denoise=1, **{"11": inpaint}))
    seen = pixels(asked.images[0])
    assert (seen[HOLE > 0] == 128).all()
    assert np.array_equal(seen[HOLE == 0], SOURCE[..., :3][HOLE == 0])
    tensor = torch.from_numpy(HOLE / 255)[None, None].float()
    padding = -(-(grow - 1) // 2)
    wide = torch.nn.functional.conv2d(tensor, torch.ones(1, 1, grow, grow), padding=padding) if grow else tensor
    expected = wide.clamp(0, 1).round()[0, 0, :64, :128].numpy()
    assert np.array_equal(pixels(asked.mask, "RGBA")[..., 3] == 0, expected > 0)  # type: ignore[arg-type]


def test_an_image_without_alpha_has_an_empty_mask() -> None:
    graph = masked()
    with pytest.raises(GraphRefused, match="0 all over"):
        read(graph, served(), lambda *_: png(hole=None))


def test_outpainting_pads_in_grey() -> None:
    graph = masked(
        **{"13": node("ImagePadForOutpaint", image=["10", 0], left=64, top=0, right=0, bottom=0, feathering=8)}
    )
    graph["11"]["inputs"]["pixels"] = ["13", 0]
    graph["12"]["inputs"]["mask"] = ["13", 1]
    asked = request(graph)
    seen = pixels(asked.images[0])
    assert (asked.width, asked.height) == (192, 64)
    assert (seen[:, :64] == 128).all()
    assert np.array_equal(seen[:, 64:], SOURCE[..., :3])
    row = kept(graph)[32].astype(int)
    assert (row[:65] == 0).all()
    assert row[64 + 4] == 255 - round(255 * 0.25)
    assert (row[64 + 8 :] == 255).all()


def test_images_in_the_graph_itself() -> None:
    graph = with_image(**{"10": node("ETN_LoadImageBase64", image=base64.b64encode(png()).decode())})
    assert request(graph).images == request(with_image()).images
    graph["10"]["inputs"]["image"] = "data:image/png;base64," + graph["10"]["inputs"]["image"]
    assert request(graph).images == request(with_image()).images
    graph["10"]["inputs"]["image"] = base64.encodebytes(png()).decode()
    assert request(graph).images == request(with_image()).images
    graph["10"]["inputs"]["image"] = "@@"
    assert "not valid base64" in refused(graph)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat.png", ("cat.png", "", "input")),
        ("a/b/cat.png", ("cat.png", "a/b", "input")),
        ("cat.png [output]", ("cat.png", "", "output")),
        ("clipspace/mask.png [temp]", ("mask.png", "clipspace", "temp")),
        ("my cat.png", ("my cat.png", "", "input")),
    ],
)
def test_files_are_named_as_comfyui_names_them(name: str, expected: tuple[str, str, str]) -> None:
    asked: list[tuple[str, str, str]] = []

    def watched(*file: str) -> bytes:
        asked.append(file)  # type: ignore[arg-type]
        return png()

    read(with_image(**{"10": node("LoadImage", image=name)}), served(), watched)
    assert asked == [expected]


def test_a_file_that_is_not_there_or_no_image() -> None:
    assert "Invalid image file: missing.png" in refused(with_image(**{"10": node("LoadImage", image="missing.png")}))
    with pytest.raises(GraphRefused, match="is a GIF; send a PNG"):
        read(with_image(), served(), lambda *_: b"GIF89a")


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (
            node("ImageScale", image=["10", 0], upscale_method="lanczos", width=256, height=0, crop="disabled"),
            (256, 128),
        ),
        (node("ImageScaleBy", image=["10", 0], upscale_method="area", scale_by=1.5), (192, 96)),
        (node("ImageScaleToTotalPixels", image=["10", 0], upscale_method="bilinear", megapixels=0.5), (1024, 512)),
        (node("ImageScaleToMaxDimension", image=["10", 0], upscale_method="area", largest_size=512), (512, 256)),
        (node("ImageInvert", image=["10", 0]), (128, 64)),
        (node("FluxKontextImageScale", image=["10", 0]), (1456, 720)),
        (
            node(
                "ImageResize+",
                image=["10", 0],
                width=256,
                height=256,
                interpolation="nearest",
                method="fill / crop",
                condition="always",
                multiple_of=8,
            ),
            (256, 256),
        ),
        (
            node(
                "ImageResize+",
                image=["10", 0],
                width=256,
                height=256,
                interpolation="lanczos",
                method="keep proportion",
                condition="downscale if bigger",
            ),
            (128, 64),
        ),
    ],
)
def test_images_are_resized(change: dict[str, Any], size: tuple[int, int]) -> None:
    graph = with_image(**{"13": change})
    graph["11"]["inputs"]["pixels"] = ["13", 0]
    asked = request(graph)
    if "Kontext" not in change["class_type"]:
        assert (asked.width, asked.height) == size
    assert asked.width * asked.height > 0  # type: ignore[operator]
    after = plain() | {"13": change}
    after["13"]["inputs"]["image"] = ["6", 0]
    after["4"]["inputs"] |= {"width": 128, "height": 64}
    after["7"]["inputs"]["images"] = ["13", 0]
    [output] = plan(after).outputs
    picture = SOURCE[..., :3]
    for each in output.after:
        picture = each(picture)
    assert np.array_equal(picture, pixels(asked.images[0]))


def essentials(**inputs: Any) -> Any:
    """A 128x64 ramp, resized."""
    given = {"interpolation": "nearest", "method": "stretch", "condition": "always", "multiple_of": 0} | inputs
    graph = plain() | {"13": node("ImageResize+", image=["6", 0], **given)}
    graph["4"]["inputs"] |= {"width": 128, "height": 64}
    graph["7"]["inputs"]["images"] = ["13", 0]
    ramp = np.repeat(np.tile(np.arange(128, dtype=np.uint8) * 2, (64, 1))[..., None], 3, 2)
    [output] = plan(graph).outputs
    for each in output.after:
        ramp = each(ramp)
    return ramp


def test_essentials_resizing_is_theirs() -> None:
    """Sides in whole cells before anything is resized, conditions of what covers them, and plain "nearest"."""
    whole = essentials(width=100, height=100, multiple_of=64)
    assert whole.shape == (64, 64, 3)
    assert whole[0, :, 0].tolist() == [4 * column for column in range(64)]
    filled = essentials(width=64, height=64, method="fill / crop", condition="downscale if bigger")
    assert filled.shape == (64, 128, 3)  # what covers 64x64 is 128x64
    assert essentials(width=64, height=64, method="fill / crop").shape == (64, 64, 3)
    assert essentials(width=64, height=64, condition="upscale if smaller").shape == (64, 128, 3)


@pytest.mark.parametrize(
    ("way", "inputs", "size"),
    [
        ("scale dimensions", {"width": 256, "height": 0, "crop": "disabled"}, (256, 128)),
        ("scale by multiplier", {"multiplier": 1.5}, (192, 96)),
        ("scale longer dimension", {"longer_size": 256}, (256, 128)),
        ("scale shorter dimension", {"shorter_size": 128}, (256, 128)),
        ("scale width", {"width": 256}, (256, 128)),
        ("scale height", {"height": 128}, (256, 128)),
        ("scale total pixels", {"megapixels": 0.5}, (1024, 512)),
        ("scale to multiple", {"multiple": 48}, (96, 48)),
    ],
)
def test_resizing_as_todays_templates_do_it(way: str, inputs: dict[str, Any], size: tuple[int, int]) -> None:
    said = {"resize_type": way, "scale_method": "area"} | {f"resize_type.{name}": one for name, one in inputs.items()}
    graph = with_image(
        **{"13": node("ResizeImageMaskNode", input=["10", 0], **said), "14": node("GetImageSize", image=["13", 0])}
    )
    graph["4"]["inputs"] |= {"width": ["14", 0], "height": ["14", 1]}
    graph["5"]["inputs"] |= {"latent_image": ["4", 0], "denoise": 1}
    if size[1] == 48:
        assert "48" in refused(graph)
        return
    assert (request(graph).width, request(graph).height) == size
    mask = masked(**{"12": node("SetLatentNoiseMask", samples=["11", 0], mask=["13", 0])})
    mask["13"] = node("ResizeImageMaskNode", input=["10", 1], **said)
    assert kept(mask).shape == (64, 128)
    del graph["13"]["inputs"][f"resize_type.{next(iter(inputs))}"]
    assert "lacks a number" in refused(graph)


def test_a_drawn_picture_is_pasted_on_one_that_was_sent() -> None:
    graph = masked()
    graph["13"] = node(
        "ImageCompositeMasked", destination=["10", 0], source=["6", 0], x=0, y=0, resize_source=False, mask=["10", 1]
    )
    graph["7"]["inputs"]["images"] = ["13", 0]
    [output] = plan(graph).outputs
    [change] = output.after
    found = change(np.full((64, 128, 3), 9, np.uint8))
    assert (found[HOLE > 0] == 9).all()
    assert np.array_equal(found[HOLE == 0], SOURCE[..., :3][HOLE == 0])


def test_what_is_pasted_may_stand_over() -> None:
    below, above = np.zeros((8, 8, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert changes.pasted(below, above, -2, 6).sum() == 2 * 2 * 3 * 255
    assert changes.pasted(below, above, 8, 0).sum() == 0


def test_reference_images_are_seen() -> None:
    graph = plain("flux-2-klein-4b.safetensors", positive=["12", 0], negative=["13", 0], latent_image=["14", 0])
    graph |= {
        "10": node("LoadImage", image="cat.png"),
        "11": node("VAEEncode", pixels=["10", 0], vae=["1", 2]),
        "12": node("ReferenceLatent", conditioning=["2", 0], latent=["11", 0]),
        "13": node("ReferenceLatent", conditioning=["15", 0], latent=["11", 0]),
        "14": node("EmptyFlux2LatentImage", width=512, height=512, batch_size=1),
        "15": node("ConditioningZeroOut", conditioning=["2", 0]),
    }
    asked = request(graph, "flux2-klein")
    assert [pixels(image).shape for image in asked.images] == [(64, 128, 3)]
    assert (asked.mask, asked.width, asked.strength) == (None, 512, None)
    graph["5"]["inputs"]["latent_image"] = ["11", 0]  # at denoise 1 a flow keeps nothing of it
    assert (request(graph, "flux2-klein").width, len(request(graph, "flux2-klein").images)) == (128, 1)
    graph["5"]["inputs"]["denoise"] = 0.5
    assert "use an empty latent" in refused(graph, "flux2-klein")
    graph["1"]["inputs"]["ckpt_name"] = "flux1-dev.safetensors"
    assert "without images to see" in refused(graph, "flux-dev")


def test_edits_by_instruction_see_their_images() -> None:
    graph = plain("flux-2-klein-4b.safetensors", positive=["12", 0], latent_image=["13", 0])
    graph |= {
        "10": node("LoadImage", image="cat.png"),
        "12": node("TextEncodeQwenImageEditPlus", clip=["1", 1], prompt="a hat", image1=["10", 0], image2=["10", 0]),
        "13": node("EmptySD3LatentImage", width=["14", 0], height=["14", 1], batch_size=1),
        "14": node("GetImageSize", image=["10", 0]),
    }
    asked = request(graph, "flux2-klein")
    assert (asked.prompt, len(asked.images), asked.width, asked.height) == ("a hat", 2, 128, 64)


def test_a_latent_that_is_larger() -> None:
    graph = plain(latent_image=["8", 0])
    graph["8"] = node("LatentUpscaleBy", samples=["4", 0], upscale_method="bislerp", scale_by=2)
    assert request(graph).width == 512
    graph = with_image(
        **{
            "12": node(
                "LatentUpscale", samples=["11", 0], upscale_method="bislerp", width=256, height=0, crop="disabled"
            )
        }
    )
    graph["5"]["inputs"]["latent_image"] = ["12", 0]
    assert (request(graph).width, request(graph).height) == (256, 128)
    assert "near, not the same" in plan(graph).notes[0]


def test_images_of_many_steps_are_limited() -> None:
    graph = plain()
    for n in range(20):
        before = [f"s{n - 1}", 0] if n else ["6", 0]
        graph[f"s{n}"] = node("ImageInvert", image=before)
    graph["7"]["inputs"]["images"] = ["s19", 0]
    assert "at most 16 times" in refused(graph)


def test_loading_is_not_asked_twice() -> None:
    count = 0

    def counted(*file: str) -> bytes:
        nonlocal count
        count += 1
        return load(*file)

    read(masked(), served(), counted)
    assert count == 1


def test_an_image_in_the_graph_may_be_as_large_as_a_body() -> None:
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(noise, "PNG")
    sent = base64.b64encode(noise.getvalue()).decode()
    assert len(sent) > 100_000
    assert request(with_image(**{"10": node("ETN_LoadImageBase64", image=sent)})).width == 256


@pytest.mark.parametrize(
    "made",
    [
        node("InvertMask", mask=["0", 0]),
        node("ThresholdMask", mask=["0", 0], value=0.5),
        node("FeatherMask", mask=["0", 0], left=1, top=0, right=0, bottom=0),
        node("MaskComposite", destination=["0", 0], source=["0", 0], x=0, y=0, operation="add"),
        node("MaskToImage", mask=["0", 0]),
        node("ImageColorToMask", image=["00", 0], color=0),
    ],
    ids=lambda made: made["class_type"],
)
def test_masks_count_among_what_a_graph_makes(made: Any) -> None:
    size = {"width": 4096, "height": 4096}
    graph = {"0": node("SolidMask", value=1, **size), "00": node("EmptyImage", batch_size=1, color=0, **size)}
    walk = Walk(graph | {"1": made}, served("spark"), load)
    walk.settle("1")
    assert (walk.wrong, walk.pixels) == ({}, 2 * 4096 * 4096)


@pytest.mark.parametrize("method", changes.METHODS)
def test_a_long_picture_becomes_a_tall_one_in_little_memory(method: str) -> None:
    """Between two passes there could be 67 million pixels, of 12 bytes each."""
    long = np.zeros((64, 8192, 3), np.uint8)
    tracemalloc.start()
    found = changes.scaled(long, 64, 8192, method)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (8192, 64, 3)
    assert peak < 64 << 20


def test_a_large_photo_is_read_at_a_reduced_scale() -> None:
    photo = io.BytesIO()
    Image.new("RGB", (6000, 4000), "red").save(photo, "JPEG")
    assert upright(photo.getvalue(), "image").size == (3000, 2000)
