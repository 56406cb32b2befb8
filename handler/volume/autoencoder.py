"""Another autoencoder in the place of a model's own: where it lies, and whether it is whole."""

import re
from dataclasses import replace
from pathlib import Path

from handler.core.errors import SettingsError, VolumeFailed, WeightsCorrupt, WeightsMissing
from handler.core.untrusted import Malformed, load
from handler.volume.manifest import Source, checked


def fetched_vae(name: str, volume: Path) -> Path:
    """Where `fetch` puts the autoencoder `owner/repository@revision`; SettingsError if that is not its name."""
    if found := re.fullmatch(r"(\w[\w.-]*)/(\w[\w.-]*)@([0-9a-f]{40})", name, re.ASCII):
        return volume / "vae" / f"{found[1]}--{found[2]}" / found[3]
    wanted = "an absolute path, or owner/repository@revision: pin a revision, with all 40 digits"
    raise SettingsError(f"KINDLING_VAE: '{name}' is not {wanted}.", "KINDLING_VAE")


def vae_source(name: str, volume: Path) -> Source:
    """The autoencoder that KINDLING_VAE names: a folder in diffusers' layout, or one that `fetch` brought."""
    if Path(name).is_absolute():
        folder, source = Path(name), Source(Path(name).parent, None)
        missing = f"KINDLING_VAE: {folder} has no config.json."
    else:
        folder = fetched_vae(name, volume) / "vae"
        missing = f"The autoencoder {name} is not on the volume. With KINDLING_VAE set, run: python -m handler fetch"
        if (found := checked(folder.parent, "autoencoder", name)) is None:
            raise WeightsMissing(missing)
        source = found
    try:
        kind = load(folder / "config.json").get("_class_name")
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsMissing(missing) from None
    except OSError as error:
        raise VolumeFailed(f"KINDLING_VAE: cannot read {folder}/config.json: {error.strerror or error}.") from None
    except Malformed as error:
        told = f"KINDLING_VAE: {folder}/config.json is no JSON object: {error}. {source.remedy}"
        raise WeightsCorrupt(told) from None
    if not isinstance(kind, str):
        raise WeightsCorrupt(f"KINDLING_VAE: {folder}/config.json names no class. {source.remedy}")
    return replace(source, index={folder.name: ["diffusers", kind]})


def label(name: str) -> str:
    """What a picture says of its autoencoder: of a folder only its own name, for where it lies is nobody's business."""
    return Path(name).name if Path(name).is_absolute() else name
