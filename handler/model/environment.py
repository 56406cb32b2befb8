"""What draws a picture: precision, device, threads, versions, compiled code; for what is told of it."""

from functools import cache

from handler.catalog.precisions import ROUNDED_BY, SCHEME
from handler.model.compiling.artifacts import version_of
from handler.model.hardware import Hardware


def environment(hardware: Hardware, package: str) -> dict[str, str]:
    """All of it that can change a pixel, for the PNG; `package` is the compiled blocks', empty without."""
    import torch

    on_gpu = hardware.device != "cpu"
    cpu = {"device": f"{hardware.identity}, {torch.backends.cpu.get_cpu_capability()}"}
    gpu = {"device": hardware.identity, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    facts = {"precision": hardware.precision, "attention": hardware.attention, "package": package}
    facts["threads"] = "any" if on_gpu else str(torch.get_num_threads())
    facts |= {"matmul": torch.get_float32_matmul_precision(), **_versions()}
    facts |= {"rounded_by": f"{ROUNDED_BY}, scheme {SCHEME}"} if hardware.quantised else {}
    return facts | (gpu if on_gpu else cpu)


@cache
def _versions() -> dict[str, str]:
    return {name: version_of(name) for name in ("torch", "diffusers", "transformers")}
