"""What a worker says of itself in ComfyUI's words: its machine, and what clients may count on."""

import contextlib
import os
import sys
from typing import Any

from handler.core.host import free_memory, host_memory
from handler.core.settings import Settings
from handler.core.version import __version__
from handler.engine.engine import Engine

SPOKEN = "0.3.64"  # of ComfyUI: the release whose routes these are
ARGV = ["--disable-api-nodes"]  # of ComfyUI's: there are none, and its page then asks no other server for news


def features(settings: Settings) -> dict[str, Any]:
    """What this server can, as its websocket and /features say."""
    most = int(settings.max_body_mb * 1e6)
    return {"supports_preview_metadata": True, "max_upload_size": most, "editor": settings.comfy_ui}


def system(engine: Engine) -> dict[str, Any]:
    """The machine and its device, in bytes. How this process was called is nobody's business. For a thread: a GPU is
    asked."""
    return {
        "system": {
            "os": os.name,
            "ram_total": host_memory(),
            "ram_free": free_memory(),
            "comfyui_version": SPOKEN,
            "kindling_version": __version__,
            "python_version": sys.version,
            "pytorch_version": getattr(sys.modules.get("torch"), "__version__", ""),
            "embedded_python": False,
            "argv": ARGV,
        },
        "devices": [_device(engine)],
    }


def _device(engine: Engine) -> dict[str, Any]:
    hardware = engine.worker.hardware if engine.worker else None
    kind, name = (hardware.device, hardware.name) if hardware else ("cpu", "starting")
    free, total, kept, unused = host_memory(), host_memory(), 0, 0
    if kind == "cuda":
        with contextlib.suppress(Exception):  # a lost GPU: the rest is told all the same
            cuda = sys.modules["torch"].cuda
            free, total = cuda.mem_get_info()
            kept = cuda.memory_reserved()
            unused = kept - cuda.memory_allocated()
    memory = {"vram_total": total, "vram_free": free, "torch_vram_total": kept, "torch_vram_free": unused}
    return {"name": f"{kind}:0 {name}" if kind == "cuda" else name, "type": kind, "index": 0, **memory}
