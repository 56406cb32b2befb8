"""Kindling: a serverless GPU function that turns text into pictures. These are its public names.

Importing this package imports neither torch nor diffusers; `Worker.boot` does, on the clock.
"""

from handler.api import Api
from handler.birth import Birth
from handler.blocks import bind_blocks, compile_blocks
from handler.catalog import MODELS, MODES
from handler.clock import Clock
from handler.core.recipe import Picture, Recipe
from handler.core.version import __version__
from handler.errors import KindlingError, StartError
from handler.fit import room_for
from handler.hardware import detect
from handler.lane import Lane
from handler.reader import Reader
from handler.reply import Reply
from handler.request import ImageRequest
from handler.server import create_app
from handler.settings import Settings
from handler.sources import fetched_folder
from handler.spec import ModelSpec
from handler.volume import checked, write_manifest
from handler.weights import load_components, tensors
from handler.worker import Worker

__all__ = [
    "MODELS",
    "MODES",
    "Api",
    "Birth",
    "Clock",
    "ImageRequest",
    "KindlingError",
    "Lane",
    "ModelSpec",
    "Picture",
    "Reader",
    "Recipe",
    "Reply",
    "Settings",
    "StartError",
    "Worker",
    "__version__",
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
