"""Which kernel of attention this worker uses: asked for, the volume's, or the fastest; and the ledger tells why."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from handler.catalog.attention import NATIVE, KernelChoice, refusals
from handler.model.attention import measured, unmeasured, use
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware
from handler.worker.clock import Clock
from handler.worker.outlook import Outlook


def settle(seen: Outlook, model: Any, clock: Clock, draw: Callable[[], object]) -> Hardware:
    """Let `model` use a kernel and the ledger tell why: the one asked for, the volume's, or what is fastest in `draw`.

    All compiled code depends on it, so what one worker measured and published the later ones follow, noise or not.
    """
    hardware = seen.hardware
    if (chosen := seen.attention) is None:
        with clock.phase("attention"):
            refused = refusals(hardware.capability, hardware.dtype)
            usable = [name for name, why in refused.items() if not why]
            volume, volume_key = seen.settings.volume, seen.settings.volume_key
            if found := artifacts.packaged(seen.spec, hardware, volume, usable, volume_key=volume_key):
                chosen = KernelChoice(found, "as what is compiled on the volume")
            elif why := unmeasured(model, seen.memory.mode == "blocks", clock.remaining):
                chosen = KernelChoice(NATIVE, why)
            else:
                chosen = measured(model, refused, draw)
    use(model, chosen)
    clock.ledger.attention = f"{chosen.id}: {chosen.reason}"
    return replace(hardware, attention=chosen.id)
