"""The rows of Stable Diffusion, as `models.py` has those of all others."""

from handler.catalog import licenses
from handler.catalog.parts import Graft, Streams
from handler.catalog.spec import ModelSpec
from handler.core.stepcache import StepCache

# Guidance is as the maker's card has it; that draws 50 steps of PNDM, where DPM++ needs 20. There is no revision, for
# nobody has written one down that was seen on the hub: `fetch` looks which commit `main` is.
SD15 = ModelSpec(
    id="sd1.5",
    repository="stable-diffusion-v1-5/stable-diffusion-v1-5",  # of what runwayml has taken down
    family="handler.model.families.sd15",
    license=licenses.OPENRAIL_M,
    parameters=860_000_000,
    other_parameters=207_000_000,
    streams=Streams(123_000_000, 38_000_000, 32_000_000),
    steps=20,
    guidance=7.5,
    size=(512, 512),
    multiple=8,
    text_tokens=77,
    schedulers=("dpm++", "euler", "euler-a", "heun", "ddim"),
    takes_negative_prompt=True,
    variant="fp16",
    aliases=("stable-diffusion-v1-5",),
)
SD35_LARGE = ModelSpec(
    id="sd3.5-large",
    repository="stabilityai/stable-diffusion-3.5-large",
    revision="ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
    family="handler.model.families.sd3",
    license=licenses.STABILITY_GATED,
    parameters=8_000_000_000,
    fp8_source="stabilityai/stable-diffusion-3.5-large-tensorrt",
    other_parameters=5_660_000_000,
    streams=Streams(5_580_000_000, 193_000_000, 213_000_000),
    steps=28,
    guidance=4.5,
    text_tokens=256,
    schedulers=("flow-match-euler", "heun", "dpm++"),
    takes_negative_prompt=True,
    step_cache=StepCache(),
    step_cache_blocks=38,
)
SDXL = ModelSpec(
    id="sdxl",
    repository="stabilityai/stable-diffusion-xl-base-1.0",
    revision="462165984030d82259a11f4367a4eed129e94a7b",
    family="handler.model.families.sdxl",
    license=licenses.OPENRAIL,
    parameters=2_570_000_000,
    other_parameters=900_000_000,
    streams=Streams(818_000_000, 63_000_000, 35_000_000),
    steps=20,
    guidance=5.0,
    multiple=8,
    text_tokens=77,
    schedulers=("dpm++", "euler", "euler-a", "heun", "ddim"),
    takes_negative_prompt=True,
    variant="fp16",
)
SDXL_TURBO = ModelSpec(
    id="sdxl-turbo",
    repository="stabilityai/sdxl-turbo",
    revision="71153311d3dbb46851df1931d3ca6e939de83304",
    family="handler.model.families.sdxl",
    license=licenses.STABILITY,
    parameters=2_570_000_000,
    other_parameters=900_000_000,
    streams=Streams(818_000_000, 63_000_000, 35_000_000),
    steps=1,
    max_steps=4,
    size=(512, 512),
    multiple=8,
    text_tokens=77,
    schedulers=("euler-a", "euler", "dpm++", "heun", "ddim"),
    variant="fp16",
)
SDXL_LIGHTNING = ModelSpec(
    id="sdxl-lightning",
    repository="ByteDance/SDXL-Lightning",
    revision="c9a24f48e1c025556787b0c58dd67a091ece2e44",
    family="handler.model.families.sdxl",
    license=licenses.OPENRAIL,
    parameters=2_570_000_000,
    other_parameters=900_000_000,
    streams=Streams(818_000_000, 63_000_000, 35_000_000),
    steps=4,
    max_steps=4,
    multiple=8,
    text_tokens=77,
    schedulers=("euler", "dpm++", "euler-a", "heun", "ddim"),
    scheduler_config={"timestep_spacing": "trailing"},
    variant="fp16",
    base=SDXL,
    grafts=(Graft("sdxl_lightning_4step_unet.safetensors", "unet/diffusion_pytorch_model.safetensors"),),
)
STABLE = (SD35_LARGE, SD15, SDXL, SDXL_TURBO, SDXL_LIGHTNING)
