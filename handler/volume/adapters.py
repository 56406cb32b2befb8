"""LoRAs on the volume: which file a name means, what it is, and what its maker says of it.

    loras/                    files, also in folders; `ink` and `styles/wash.safetensors` are names
    models/loras/             likewise, where the volume is worker-comfyui's too
    ComfyUI/models/loras/     or ComfyUI's
    fetched/loras/            what `fetch` brought of KINDLING_LORAS

How names are looked up, `named.py` says.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from handler.core.errors import InvalidValue
from handler.core.loras import Wanted
from handler.core.recipe import Lora
from handler.core.untrusted import OURS, Malformed, parse, printed
from handler.volume.layout import FLOATS, Slot, layout, read_head
from handler.volume.manifest import CHUNK
from handler.volume.named import REMEMBERED, Folders, hashed, stamp
from handler.volume.single import strange

FETCHED = "fetched/loras"
FOLDERS = ("loras", "models/loras", "ComfyUI/models/loras", FETCHED)  # whose files go before those of the same name
KEPT = Folders("loras", FOLDERS)
LARGEST = 4 << 30  # bytes of a file: the largest published, of rank 256 for FLUX.2 [dev], have less
WORDS = 5  # trigger words of a LoRA
KINDS = {  # what is no LoRA as it is meant here, by what a tensor's name contains
    r"dora_scale|lora_magnitude_vector": "a DoRA, which also scales the weights",
    r"lokr_": "a LoKr, a product of Kronecker's",
    r"hada_": "a LoHa, a product of Hadamard's",
    r"lora_mid": "a LoCon with a core of its own",
    r"\.diff(_b)?$": "more than a LoRA: it has whole differences of weights",
}
PART = re.compile(r"(?=.{1,400}$).+([._]lora([._]|_linear_layer|[0-9]).*|\.alpha)")
MAKERS = ("modelspec.architecture", "ss_base_model_version", "base_model")  # what trainers call what it was made for


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA's file: `made_for` and `trigger_words` are its maker's own words, `fault` says why it cannot be used."""

    name: str
    bytes: int
    made_for: str
    trigger_words: tuple[str, ...]
    fault: str = ""


def chosen(wanted: Iterable[Wanted], volume: Path) -> tuple[Lora, ...]:
    """The files that a request's names mean. InvalidValue says which is not there, or is no LoRA that can be used."""
    return tuple(_chosen(one, volume) for one in wanted)


def adapters(volume: Path) -> list[Adapter]:
    """All that are on the volume, by name."""
    return [_described(name, path) for name, path in sorted(KEPT.files(volume).items())]


def names(volume: Path) -> list[str]:
    """Of all that are on the volume and can be used."""
    return [one.name for one in adapters(volume) if not one.fault]


def _chosen(wanted: Wanted, volume: Path) -> Lora:
    name = wanted.name
    try:
        name, path = KEPT.found(name, volume)
        seen = stamp(path)
        if fault := _fault(*seen):
            raise InvalidValue(f"loras: '{name}' cannot be used: it is {fault}.", "loras")
        clip = None if wanted.clip_weight == wanted.weight else wanted.clip_weight
        return Lora(name, wanted.weight, hashed(*seen), path, clip)
    except OSError as error:
        raise InvalidValue(f"loras: '{name}' cannot be read: {error.strerror}.", "loras") from None


@lru_cache(REMEMBERED)
def _fault(path: Path, size: int, written: int, changed: int) -> str:
    """Why the file is no LoRA that can be used, told from its header alone; empty for one that may be."""
    if size > LARGEST:
        return f"too large: it has {size / 1e9:.1f} GB, and a LoRA may have {LARGEST / 1e9:.1f}"
    head, whole = read_head(path)
    try:
        return _unusable(layout(head, whole))
    except ValueError as error:
        why = strange(head).removesuffix(".")
        return f"no safetensors file. {why}" if why else f"no whole safetensors file: {_shown(str(error))}"


def _unusable(slots: Mapping[str, Slot]) -> str:
    strange = next((name for name in slots if not (PART.fullmatch(name) and name.isprintable())), None)
    for sign, kind in KINDS.items():
        if any(re.search(sign, name) for name in slots):
            return kind
    if strange is not None or not slots:
        return f"no LoRA: it has {_shown(strange)}" if strange else "empty"
    typed = next((name for name, slot in slots.items() if slot.dtype not in FLOATS), None)
    return f"kept in {slots[typed].dtype}, and should be in 16 or 32 bits: {typed:.80}" if typed else ""


def _described(name: str, path: Path) -> Adapter:
    try:
        seen = stamp(path)
        return Adapter(name, seen[1], *_about(*seen), _fault(*seen))
    except OSError as error:
        return Adapter(name, 0, "", (), f"not to be read: {error.strerror}")


@lru_cache(REMEMBERED)
def _about(path: Path, size: int, written: int, changed: int) -> tuple[str, tuple[str, ...]]:
    """What it was made for, and its trigger words, as its metadata has them."""
    said = _metadata(path)
    made_for = next((said[name] for name in MAKERS if said.get(name)), "")
    phrase = said.get("modelspec.trigger_phrase", "")
    words = [phrase] if phrase else list(_frequent(said.get("ss_tag_frequency", "{}")))
    return _shown(made_for), tuple(_shown(word) for word in words[:WORDS])


def _metadata(path: Path) -> dict[str, str]:
    """What whoever made the file wrote about it; nothing where that makes no sense."""
    with path.open("rb") as file:
        head = file.read(min(int.from_bytes(file.read(8), "little"), CHUNK))
    try:
        found = parse(head, marks=OURS)["__metadata__"].items()
    except (Malformed, KeyError, TypeError, AttributeError):
        return {}
    return {name: text for name, text in found if isinstance(text, str)}


def _frequent(text: str) -> Iterator[str]:
    """The tags that a trainer saw, the most frequent first: `{folder: {tag: times}}`."""
    counts: dict[str, float] = {}
    try:
        for tags in parse(text, marks=OURS).values():
            for tag, times in tags.items():
                counts[tag] = counts.get(tag, 0) + times
    except (Malformed, AttributeError, TypeError, OverflowError):
        return
    yield from sorted(counts, key=lambda tag: (-counts[tag], tag))


def _shown(text: str) -> str:
    """What others wrote, for people: one short line."""
    return printed(text).strip()[:100]
