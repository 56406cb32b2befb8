"""Kindling: a serverless GPU function that turns text into pictures. These are its public names.

Importing this package imports neither torch nor diffusers; `Worker.boot` does, on the clock.
"""

__version__ = "0.1.0"

from handler.api import Api, Reply
from handler.catalog import MODELS, MODES, ModelSpec
from handler.clock import Clock
from handler.errors import KindlingError, StartError
from handler.lane import Lane
from handler.request import ImageRequest, Picture, Recipe
from handler.server import create_app
from handler.settings import Settings
from handler.worker import Worker

__all__ = [
    "MODELS",
    "MODES",
    "Api",
    "Clock",
    "ImageRequest",
    "KindlingError",
    "Lane",
    "ModelSpec",
    "Picture",
    "Recipe",
    "Reply",
    "Settings",
    "StartError",
    "Worker",
    "create_app",
]
