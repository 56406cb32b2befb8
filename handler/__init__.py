"""Kindling: a serverless GPU function that turns text into pictures. These are its public names.

Importing this package imports neither torch nor diffusers; `Worker.boot` does, on the clock.
"""

from handler.api.dispatch import Api
from handler.api.embedded import Engine
from handler.api.reply import Reply
from handler.catalog.models import MODELS, MODES
from handler.catalog.spec import ModelSpec
from handler.core.birth import Birth
from handler.core.errors import KindlingError, StartError
from handler.core.recipe import Picture, Recipe
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.core.version import __version__ as __version__
from handler.model.compiling.package import bind_blocks, compile_blocks
from handler.model.hardware import detect
from handler.model.loading.weights import load_components, tensors
from handler.server import create_app
from handler.volume.manifest import checked, write_manifest
from handler.volume.reader import Reader
from handler.volume.sources import fetched_folder
from handler.worker.clock import Clock
from handler.worker.memory import room_for
from handler.worker.worker import Worker

__all__ = [
    "MODELS",
    "MODES",
    "Api",
    "Birth",
    "Clock",
    "Engine",
    "ImageRequest",
    "KindlingError",
    "ModelSpec",
    "Picture",
    "Reader",
    "Recipe",
    "Reply",
    "Settings",
    "StartError",
    "Worker",
    "bind_blocks",
    "checked",
    "compile_blocks",
    "create_app",
    "detect",
    "fetched_folder",
    "load_components",
    "room_for",
    "tensors",
    "write_manifest",
]
