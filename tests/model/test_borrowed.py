"""What a run borrows of its pipeline comes back as it was, however the run ends."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT
from torch import nn

import tiny
from fakes import raises
from handler import MODELS, ImageRequest, Worker
from handler.core.errors import OutOfMemory
from handler.core.recipe import Recipe, Reference
from handler.model.families import Components

FULL = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """In fp16, where diffusers decodes with the VAE in fp32."""
    volume = tmp_path_factory.mktemp("volume")
    tiny.write(MODELS["sdxl"], volume)
    update = {"model": "sdxl", "volume": volume, "precision": "fp16", "compile": "off"}
    with pytest.MonkeyPatch.context() as hurry:
        hurry.setattr(Worker, "_warm", lambda *_: None)  # a picture of full size
        return Worker.boot(PATIENT.model_copy(update=update))


def recipe(worker: Worker, images: tuple[Reference, ...] = ()) -> Recipe:
    asked = ImageRequest(prompt="x", seed=1, width=64, height=64, num_inference_steps=2, images=(b"x",) * len(images))
    return worker.spec.recipe(asked, images)


@pytest.mark.filterwarnings("ignore:.upcast_vae:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("where", ["decoder", "encoder", "post_quant_conv"])
@pytest.mark.parametrize("error", [FULL, RuntimeError("a bug"), KeyboardInterrupt()], ids=["oom", "bug", "ctrl-c"])
def test_a_vae_that_failed_in_fp32_is_fp16_again(
    sdxl: Worker, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit encodes its image in fp32 too."""
    vae = sdxl._pipeline.vae
    wanted = recipe(sdxl, (Reference(np.full((64, 64, 3), 90, np.uint8), "x"),) if where == "encoder" else ())
    plain, before = sdxl.generate(recipe(sdxl))[0].rgb, sdxl.generate(wanted)[0].rgb
    at = [(weight.dtype, weight.shape) for weight in vae.parameters()]
    with monkeypatch.context() as broken:
        broken.setattr(getattr(vae, where), "forward", lambda *_: raises(error)())
        with pytest.raises(OutOfMemory if error is FULL else type(error)):
            sdxl.generate(wanted)
    assert [(weight.dtype, weight.shape) for weight in vae.parameters()] == at
    assert vae.dtype == torch.float16
    assert (sdxl.generate(wanted)[0].rgb == before).all()
    assert (sdxl.generate(recipe(sdxl))[0].rgb == plain).all()


class Part(nn.Module):
    """A component with a weight and a buffer, also a level deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(2, 2).requires_grad_(False)
        self.deep.weight.fill_(0.5)  # as exact in half
        self.deep.bias.fill_(2)
        self.register_buffer("mean", torch.zeros(2))
        self.deep.register_buffer("scale", torch.ones(2))
        self.use_tiling, self.held = False, list[int]()


CHANGES: dict[str, Callable[[Any], object]] = {
    "type": lambda pipeline: pipeline.vae.to(torch.float64),
    "type of a part": lambda pipeline: pipeline.vae.deep.half(),
    "device": lambda pipeline: pipeline.vae.deep.weight.data.to("meta"),
    "hook": lambda pipeline: pipeline.vae.register_forward_hook(lambda *_: None),
    "hook before": lambda pipeline: pipeline.vae.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "attribute": lambda pipeline: setattr(pipeline.vae, "use_tiling", True),
    "what it held": lambda pipeline: setattr(pipeline.vae, "held", [1]),
    "patched": lambda pipeline: setattr(pipeline.vae, "forward", None),
    "module": lambda pipeline: setattr(pipeline.vae, "deep", nn.Identity()),
    "component": lambda pipeline: setattr(pipeline, "vae", None),
    "scheduler": lambda pipeline: setattr(pipeline.scheduler, "timesteps", [1, 2]),
    "scheduler's place": lambda pipeline: setattr(pipeline, "scheduler", None),
    "training": lambda pipeline: pipeline.vae.train(),
}


def state(pipeline: Any) -> list[Any]:
    """What a picture depends on."""
    vae = pipeline.vae
    tensors = [(name, tensor.dtype, tensor.device, tensor.tolist()) for name, tensor in vae.state_dict().items()]
    hooks = [len(vae._forward_hooks), len(vae._forward_pre_hooks), len(vae._forward_pre_hooks_with_kwargs)]
    own = {name: value for name, value in vars(vae).items() if not name.startswith("_")}
    return [tensors, hooks, own, list(vae._modules.items()), vars(pipeline.scheduler), vae.training]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_changed_is_changed_back(change: str, error: type[BaseException]) -> None:
    parts = {"vae": Part().eval(), "scheduler": SimpleNamespace(timesteps=[1]), "tokenizer": None}
    pipeline = SimpleNamespace(**parts, components=parts)
    components, before = Components(pipeline), repr(state(pipeline))

    @torch.inference_mode()
    def run() -> None:
        with components.lent():
            CHANGES[change](pipeline)
            raise error

    with pytest.raises(error):
        run()
    assert repr(state(pipeline)) == before
    assert pipeline.vae.deep(torch.ones(1, 2)).dtype == torch.float32  # and it computes


def test_what_ends_well_keeps_what_it_found_out() -> None:
    """diffusers notes things on modules that take long to find again."""
    parts = {"vae": Part()}
    pipeline = SimpleNamespace(**parts, components=parts)
    with Components(pipeline).lent():
        parts["vae"].known = True
    assert parts["vae"].known
