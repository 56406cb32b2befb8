"""Where a model's files are: shipped inside this package, or on the volume at models/<id>/<revision>/."""

from pathlib import Path

from handler.catalog import ModelSpec
from handler.errors import WeightsMissing

EMBEDDED = Path(__file__).parent / "weights"
INDEX = "model_index.json"


def model_folder(spec: ModelSpec, volume: Path) -> Path:
    """The folder of `spec`'s files; WeightsMissing, with the command that brings them, if it is not complete."""
    folder = EMBEDDED / spec.id if spec.embedded else volume / "models" / spec.id / spec.revision
    if (folder / INDEX).is_file():
        return folder
    if spec.embedded:
        raise WeightsMissing(f"The embedded weights of {spec.id} are not in {folder}. Is the installation complete?")
    gate = " Accept its licence on its hub page first and set HF_TOKEN." if spec.license.gated else ""
    raise WeightsMissing(
        f"{spec.id} is not on the volume: no {INDEX} in {folder}.{gate} Fetch it with: hf download {spec.repository} "
        f"--revision {spec.revision} --local-dir '{folder}'"
    )
