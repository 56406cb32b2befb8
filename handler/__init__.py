"""Kindling: a serverless GPU function that turns text into pictures. These are its public names.

Importing this package imports neither torch nor diffusers; `Worker.boot` does, on the clock.
"""

from handler.api.comfy.worker_comfyui import draw_workflow
from handler.api.dispatch import Api
from handler.api.elsewhere.events import Event, Look, Lost, draw_events
from handler.api.elsewhere.need import replica_need
from handler.api.embedded import Engine
from handler.api.reply import Reply
from handler.catalog.cuda import cuda_build
from handler.catalog.gpus import GPUS
from handler.catalog.models import MODELS, MODES, find
from handler.catalog.precisions import PRECISIONS
from handler.catalog.spec import ModelSpec
from handler.core import errors
from handler.core.recipe import Picture, Recipe
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.core.untrusted import parse as parse_json
from handler.core.version import __version__
from handler.model.upstream import dedicated
from handler.server import create_app, create_front
from handler.worker.clock import Clock
from handler.worker.outlook import outlook
from handler.worker.preload import preload
from handler.worker.renting import choose_gpus
from handler.worker.worker import Worker

__all__ = [
    "GPUS",
    "MODELS",
    "MODES",
    "PRECISIONS",
    "Api",
    "Clock",
    "Engine",
    "Event",
    "ImageRequest",
    "Look",
    "Lost",
    "ModelSpec",
    "Picture",
    "Recipe",
    "Reply",
    "Settings",
    "Worker",
    "__version__",
    "choose_gpus",
    "create_app",
    "create_front",
    "cuda_build",
    "dedicated",
    "draw_events",
    "draw_workflow",
    "errors",
    "find",
    "outlook",
    "parse_json",
    "preload",
    "replica_need",
]
