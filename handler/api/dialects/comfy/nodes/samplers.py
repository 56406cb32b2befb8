"""Samplers, schedules, noises and guiders: what makes a request of all that led to it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from handler.api.dialects.comfy.drawing import How, draw
from handler.api.dialects.comfy.node import (
    CFG,
    CONDITIONING,
    DENOISE,
    GUIDER,
    LATENT,
    MODEL,
    NOISE,
    SAMPLER,
    SAMPLER_NAME,
    SCHEDULER,
    SEED,
    SIGMAS,
    STEPS,
    VAE,
    YES,
    At,
    Node,
    choice,
    maybe,
    number,
    rows,
    whole,
)
from handler.api.dialects.comfy.nodes.latents import unsampled
from handler.api.dialects.comfy.nodes.schedules import TABLE as SCHEDULES
from handler.api.dialects.comfy.values import Conditioning, Drawn, Guider, Latent, Model, Noise, Sampler, Sigmas

Samples = Latent | Drawn


def ksampler(
    at: At,
    model: Model,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Samples,
    denoise: float,
) -> Drawn:
    """The plain one."""
    how = How(seed, Sampler(sampler_name), Sigmas(scheduler, steps, denoise))
    return draw(at, Guider(model, positive, negative, cfg), unsampled(at, latent_image), how)


def advanced(
    at: At,
    model: Model,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Conditioning,
    negative: Conditioning,
    latent_image: Samples,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
) -> Drawn:
    """With a first and a last step."""
    sigmas = Sigmas(scheduler, steps, 1.0, start_at_step, end_at_step if end_at_step < steps else None)
    leftover = return_with_leftover_noise == "enable" and end_at_step < steps
    how = How(noise_seed, Sampler(sampler_name), sigmas, add_noise == "enable", leftover)
    return draw(at, Guider(model, positive, negative, cfg), unsampled(at, latent_image), how)


def custom(
    at: At,
    model: Model,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: Conditioning,
    negative: Conditioning,
    sampler: Sampler,
    sigmas: Sigmas,
    latent_image: Samples,
) -> tuple[Drawn, Drawn]:
    """With a schedule of its own."""
    how = How(noise_seed, sampler, sigmas, add_noise, sigmas.leaves_noise, custom=True)
    return _both(at, Guider(model, positive, negative, cfg), latent_image, how)


def custom_advanced(
    at: At, noise: Noise, guider: Guider, sampler: Sampler, sigmas: Sigmas, latent_image: Samples
) -> tuple[Drawn, Drawn]:
    """All of it in parts."""
    how = How(noise.seed or 0, sampler, sigmas, noise.seed is not None, sigmas.leaves_noise, custom=True)
    return _both(at, guider, latent_image, how)


def _both(at: At, guider: Guider, latent_image: Samples, how: How) -> tuple[Drawn, Drawn]:
    """What the last step leaves, and what it headed for: where noise is left, what a last step to 0 makes."""
    latent = unsampled(at, latent_image)
    drawn = draw(at, guider, latent, how)
    if not how.leftover_noise:
        return drawn, drawn
    return drawn, draw(at, guider, latent, replace(how, sigmas=how.sigmas.to_zero, leftover_noise=False))


def basic_guider(at: At, model: Model, conditioning: Conditioning) -> Guider:
    """Without a negative."""
    return Guider(model, conditioning)


def cfg_guider(at: At, model: Model, positive: Conditioning, negative: Conditioning, cfg: float) -> Guider:
    """With classifier-free guidance."""
    return Guider(model, positive, negative, cfg)


def random_noise(at: At, noise_seed: int) -> Noise:
    """By seed."""
    return Noise(noise_seed)


def no_noise(at: At) -> Noise:
    """None is added."""
    return Noise(None)


def select(at: At, sampler_name: str) -> Sampler:
    """By name."""
    return Sampler(sampler_name)


def decode(at: At, samples: Samples, vae: Any, **_: Any) -> Drawn:
    """The picture of what was sampled."""
    if isinstance(samples, Latent):
        at.refuse("it decodes a latent that no sampler has worked on, so that nothing is drawn.", "samples")
    return samples


def noisy(name: str) -> Callable[..., Sampler]:
    """A sampler as a node of its own, with how much noise its steps add."""

    def run(at: At, eta: float, s_noise: float, solver_type: str = "", noise_device: str = "") -> Sampler:
        form = ("_heun" if solver_type == "heun" else "") + ("_gpu" if noise_device == "gpu" else "")
        return Sampler(f"{name}{form}", eta, s_noise)

    return run


WIDE = {"model": MODEL, "seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": SAMPLER_NAME, "scheduler": SCHEDULER}
PAIR = {"positive": CONDITIONING, "negative": CONDITIONING}
SWITCH = choice("enable", "disable")
END = whole(10000, 0, 10000)
SAMPLING, CUSTOM = "sampling", "sampling/custom_sampling"
NOISES = {"eta": number(1.0, 0, 100), "s_noise": number(1.0, 0, 100)}
SOLVER, WHERE = choice("midpoint", "heun"), choice("gpu", "cpu")
TWO = ("output", "denoised_output")
ADVANCED = {
    "model": MODEL,
    "add_noise": SWITCH,
    "noise_seed": SEED,
    **{name: wanted for name, wanted in WIDE.items() if name not in ("model", "seed")},
    **PAIR,
    "latent_image": LATENT,
    "start_at_step": whole(0, 0, 10000),
    "end_at_step": END,
    "return_with_leftover_noise": choice("disable", "enable"),
}
TABLE = SCHEDULES | rows(
    Node("KSampler", SAMPLING, ksampler, ("LATENT",), {**WIDE, **PAIR, "latent_image": LATENT, "denoise": DENOISE}),
    Node("KSamplerAdvanced", SAMPLING, advanced, ("LATENT",), ADVANCED),
    Node(
        "SamplerCustom",
        CUSTOM,
        custom,
        ("LATENT", "LATENT"),
        {
            "model": MODEL,
            "add_noise": YES,
            "noise_seed": SEED,
            "cfg": CFG,
            **PAIR,
            "sampler": SAMPLER,
            "sigmas": SIGMAS,
            "latent_image": LATENT,
        },
        names=TWO,
    ),
    Node(
        "SamplerCustomAdvanced",
        CUSTOM,
        custom_advanced,
        ("LATENT", "LATENT"),
        {"noise": NOISE, "guider": GUIDER, "sampler": SAMPLER, "sigmas": SIGMAS, "latent_image": LATENT},
        names=TWO,
    ),
    Node("BasicGuider", CUSTOM, basic_guider, ("GUIDER",), {"model": MODEL, "conditioning": CONDITIONING}),
    Node("CFGGuider", CUSTOM, cfg_guider, ("GUIDER",), {"model": MODEL, **PAIR, "cfg": CFG}),
    Node("RandomNoise", CUSTOM, random_noise, ("NOISE",), {"noise_seed": SEED}),
    Node("DisableNoise", CUSTOM, no_noise, ("NOISE",)),
    Node("KSamplerSelect", CUSTOM, select, ("SAMPLER",), {"sampler_name": SAMPLER_NAME}),
    Node("SamplerEulerAncestral", CUSTOM, noisy("euler_ancestral"), ("SAMPLER",), NOISES),
    Node("SamplerDPMPP_2S_Ancestral", CUSTOM, noisy("dpmpp_2s_ancestral"), ("SAMPLER",), NOISES),
    Node(
        "SamplerDPMPP_2M_SDE",
        CUSTOM,
        noisy("dpmpp_2m_sde"),
        ("SAMPLER",),
        {"solver_type": SOLVER, **NOISES, "noise_device": WHERE},
    ),
    Node("SamplerDPMPP_3M_SDE", CUSTOM, noisy("dpmpp_3m_sde"), ("SAMPLER",), {**NOISES, "noise_device": WHERE}),
    Node("VAEDecode", "latent", decode, ("IMAGE",), {"samples": LATENT, "vae": VAE}, title="VAE Decode"),
    Node(
        "VAEDecodeTiled",
        "latent",
        decode,
        ("IMAGE",),
        {
            "samples": LATENT,
            "vae": VAE,
            "tile_size": whole(512, 64, 4096, 32),
            "overlap": maybe(whole(64, 0, 4096, 32)),
            "temporal_size": maybe(whole(64, 8, 4096, 4)),
            "temporal_overlap": maybe(whole(8, 4, 4096, 4)),
        },
    ),
)
