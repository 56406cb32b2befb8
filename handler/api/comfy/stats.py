"""What a worker says of itself in ComfyUI's words: its machine, and what clients may count on."""

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
    most = int(max(settings.max_body_mb, settings.max_edit_mb) * 1e6)
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
        "devices": [_device(i, one) for i, one in enumerate(engine.workers.values())],
    }


def _device(index: int, engine: Engine) -> dict[str, Any]:
    hardware = engine.worker.hardware if engine.worker else None
    kind, name = (hardware.device, hardware.name) if hardware else ("cpu", "starting")
    told = engine.worker.readings() if engine.worker else {}
    total = told.get("gpu_total", host_memory())
    memory = {
        "vram_total": total,
        "vram_free": total - told.get("gpu_used", 0),
        "torch_vram_total": told.get("gpu_kept", 0),
        "torch_vram_free": told.get("gpu_unused", 0),
    }
    return {"name": f"{kind}:{index} {name}" if kind == "cuda" else name, "type": kind, "index": index, **memory}
