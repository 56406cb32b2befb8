"""A row of the table of node classes: what goes in, what comes out, and the function that says what it means here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Never, Protocol

from handler.api.dialects.comfy.plan import Load, Served
from handler.core.request import MAX_SEED

MAX_SIDE: Final = 16384
LONGEST = 100_000  # characters of a text
SAMPLERS = (
    *("euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2"),
    *("dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"),
    *("dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
    *("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm"),
    *("ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral"),
    *("res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2"),
    *("seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2"),
)  # ComfyUI's, in its order
SCHEDULERS = (
    *("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic"),
    "kl_optimal",
)


class Refused(Exception):
    """What a node asks for is not offered: a sentence that says so and what to use instead."""

    def __init__(self, sentence: str, name: str = "", kind: str = "custom_validation_failed") -> None:
        super().__init__(sentence)
        self.sentence, self.name, self.kind = sentence, name, kind


class At(Protocol):
    """Where a node's function stands: what the worker serves, and where notes go."""

    node: str
    kind: str
    served: Served
    load: Load

    def note(self, sentence: str) -> None:
        """Tell people what is ignored or only approximate."""

    def spend(self, pixels: int) -> None:
        """Refuse what would make, all in all, too many pixels."""

    def refuse(self, sentence: str, name: str = "") -> Never:
        """Refuse the node; `name` is the input that it is about."""
        raise Refused(sentence, name)


@dataclass(frozen=True, slots=True)
class Input:
    """What an input takes: a type by ComfyUI's name, or choices; `folder` has them where they are files.

    A text has at most `longest` characters.
    """

    type: str | tuple[str, ...]
    default: Any = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    folder: str = ""
    required: bool = True
    lazy: bool = False
    multiline: bool = False
    longest: int = LONGEST


@dataclass(frozen=True, slots=True)
class Node:
    """One class. `outputs` are types; `run` gets `At` and every input by name, and gives one value for each of them.

    `chooses` says of a lazy class which of its lazy inputs are wanted, given all others. `rest` takes what inputs are
    not listed, as one mapping of that name. An `output` gives what it shows.
    """

    name: str
    category: str
    run: Callable[..., Any]
    outputs: tuple[str, ...]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    output: bool = False
    chooses: Callable[..., tuple[str, ...]] | None = None
    rest: str = ""
    title: str = ""
    names: tuple[str, ...] = ()  # of the outputs, where these are not their types


def rows(*nodes: Node) -> dict[str, Node]:
    """A table of `nodes` by name."""
    return {node.name: node for node in nodes}


def whole(default: int = 0, low: float | None = None, high: float | None = None, step: int = 1) -> Input:
    """An INT."""
    return Input("INT", default, low, high, step)


def number(default: float = 1.0, low: float | None = None, high: float | None = None, step: float = 0.01) -> Input:
    """A FLOAT."""
    return Input("FLOAT", default, low, high, step)


def text(default: str = "", multiline: bool = True) -> Input:
    """A STRING."""
    return Input("STRING", default, multiline=multiline)


def choice(*names: str) -> Input:
    """One of several words, the first where none is said."""
    return Input(names, names[0])


def files(folder: str) -> Input:
    """A file of one of ComfyUI's folders."""
    return Input((), folder=folder)


def maybe(one: Input) -> Input:
    """The same, which may be left out."""
    return replace(one, required=False)


def lazily(one: Input) -> Input:
    """The same, looked at only where it is chosen."""
    return replace(one, lazy=True)


MODEL, CLIP, VAE = Input("MODEL"), Input("CLIP"), Input("VAE")
CONDITIONING, LATENT, IMAGE, MASK = Input("CONDITIONING"), Input("LATENT"), Input("IMAGE"), Input("MASK")
NOISE, GUIDER, SAMPLER, SIGMAS = Input("NOISE"), Input("GUIDER"), Input("SAMPLER"), Input("SIGMAS")
ANY = Input("*")
SEED = whole(0, 0, MAX_SEED)
STEPS, CFG, DENOISE = whole(20, 1, 10000), number(8.0, 0, 100, 0.1), number(1.0, 0, 1)
SAMPLER_NAME, SCHEDULER = choice(*SAMPLERS), choice(*SCHEDULERS)
BATCH = whole(1, 1, 4096)
FLAG, YES = Input("BOOLEAN", False), Input("BOOLEAN", True)
