"""JSON Schemas of what goes out. They name all the fields there are, and stay open for more."""

from typing import get_args

from pydantic import TypeAdapter

from handler.api.comfy.report import Report
from handler.catalog.prices import Price
from handler.core.quality import Quality
from handler.core.recipe import OPTIONAL, Recipe
from handler.core.request import Format
from handler.engine.intake import EngineState
from handler.engine.spend import Verdict
from handler.server.openapi import fal
from handler.server.openapi.jobs import JOB, SAID
from handler.server.openapi.schema import COUNT, NULL, NUMBER, REF, TEXT, Schema, array, only, ref, whole
from handler.volume.receipts import Receipt
from handler.worker.clock import Ledger

HASH = TEXT | {"description": "SHA-256 of the file."}
MARK = TEXT | {"description": "The first two hexadecimal digits of the file's SHA-256: it names nobody's file."}
MAYBE_NUMBER = {"type": ["number", "null"]}
SEED = COUNT | {"description": "Send it again for the same picture."}
BYTES = TEXT | {"contentEncoding": "base64", "description": "The picture file."}
PICTURE = {"b64_json": BYTES, "url": TEXT | {"description": "Where it is, if it is not here."}, "seed": SEED}
PLAN = TEXT | {"description": "COMPILED or EAGER, and why."}
SIZE = TEXT | {"pattern": "^[0-9]+x[0-9]+$"}

OPEN = {"Recipe": OPTIONAL}  # what is left out where there is none


def types() -> dict[str, Schema]:
    """Of the dataclasses that answers have in them, as `asdict` gives them: with every field."""
    kinds = (Ledger, Price, Verdict, Receipt, Recipe, Report)
    adapters = [(kind.__name__, "serialization", TypeAdapter(kind)) for kind in kinds]
    _, found = TypeAdapter.json_schemas(adapters, ref_template=REF)  # type: ignore[arg-type]
    defined: dict[str, Schema] = found["$defs"]
    del defined["Reference"], defined["Mask"], defined["Lora"], defined["Embedding"]
    applied = array(whole({"name": TEXT, "weight": NUMBER, "clip_weight": NUMBER, "sha256": HASH}, "clip_weight"))
    defined["Recipe"]["properties"] |= {"images": array(MARK), "mask": {"anyOf": [MARK, NULL]}, "loras": applied}
    defined["Recipe"]["properties"]["long_prompts"] = only("chunked")
    defined["Recipe"]["properties"]["embeddings"] = array(whole({"name": TEXT, "sha256": HASH}))
    return {name: schema | whole(schema["properties"], *OPEN.get(name, ())) for name, schema in defined.items()}


def _events(*names: str) -> Schema:
    """What the data of a stream's events may be."""
    return {"oneOf": [ref(name) for name in (*names, "Error")]}


def _event(kind: str) -> Schema:
    return {"type": only(kind)}


def _picture(fields: Schema, *optional: str) -> Schema:
    """An object that has a picture, as bytes or else by its address."""
    return whole(fields, *PICTURE.keys() - {"seed"}, *optional)


LORA = whole({"name": TEXT, "made_for": TEXT, "trigger_words": array(TEXT)})
MODEL = whole({"id": TEXT, "object": only("model"), "created": COUNT, "owned_by": TEXT})
REFUSED = {"refused": TEXT | {"description": "Why it cannot be asked for, where that is so."}}
FIELD = {
    **dict.fromkeys(("minimum", "maximum", "default"), NUMBER),
    "multiple": COUNT,
    "values": array(TEXT),
    **REFUSED,
}
MODE = whole({"id": TEXT, "quality": TEXT, "steps": COUNT, **REFUSED}, "refused")
LICENSE = {"id": TEXT, "name": TEXT, "commercial": {"type": "boolean"}, "obligation": TEXT}
ABILITIES = {
    "model": TEXT | {"description": "The catalogue's name for it."},
    "embedded": {"type": "boolean", "description": "Whether it is the small model inside Kindling."},
    "license": whole(LICENSE),
    "modes": array(MODE) | {"description": "Each as the word for quality that is closest to it."},
    "fields": {"type": "object", "additionalProperties": ref("Ability")},
}
SHARED = {
    "background": only("opaque"),
    "output_format": ref("Format"),
    "quality": {"enum": list(get_args(Quality))},
    "size": SIZE,
}
READ = whole({"text_tokens": COUNT, "image_tokens": COUNT})
TOKENS = whole({"given": COUNT, "read": COUNT | {"description": "Less than were given where the model has no more."}})
USAGE = whole({"input_tokens": COUNT, "input_tokens_details": READ, "output_tokens": COUNT, "total_tokens": COUNT})
PEAK = {"peak_memory_mb": NUMBER | {"description": "The most memory so far: the GPU's, or on a CPU the process's."}}
DELIVERY = {"delivery": TEXT | {"description": "Why a picture has no url that should have one."}}
UNKNOWN = {"unknown_words": array(TEXT) | {"description": "Of the prompt, those that spark does not know: 20 at most."}}
ABOUT = {
    "inference_ms": NUMBER,
    "width": COUNT,
    "height": COUNT,
    "model": TEXT,
    "plan": PLAN,
    "usage": ref("Usage"),
    "prompt_tokens": ref("PromptTokens"),
    **UNKNOWN,
    **PEAK,
    **DELIVERY,
}
STAGES = {"type": "object", "additionalProperties": NUMBER, "description": "Seconds by stage."}
DRAWN = PICTURE | {"format": ref("Format"), "parameters": ref("Recipe"), "stages_s": STAGES}
ALONE = {"image": fal.IMAGE | {"description": "A picture that is alone, by a URL or as a data URL."}, "seed": SEED}
NOTES = {"notes": array(TEXT) | {"description": "What was sent and changes nothing here."}}
NATIVE = {
    "images": array(ref("NativePicture")),
    **ALONE,
    "model": TEXT,
    "inference_ms": NUMBER,
    "plan": PLAN,
    "usage": ref("Usage"),
    "prompt_tokens": ref("PromptTokens"),
    **UNKNOWN,
    **PEAK,
    **DELIVERY,
    **NOTES,
}
SELDOM = ("delivery", "unknown_words")
RARE = (*SELDOM, "notes", *ALONE)
STEPS = {"steps": COUNT, "of": COUNT | {"description": "Over all pictures of the request."}}
PARTIAL = {"partial_image_index": COUNT, "b64_json": BYTES, "created_at": COUNT, **SHARED}
COMPLETED = PICTURE | {"created_at": COUNT} | SHARED | ABOUT
GPU = dict.fromkeys(
    ("gpu_used", "gpu_total", "gpu_peak", "gpu_kept", "gpu_unused", "gpu_utilization", "gpu_temperature"), NUMBER
)
MACHINE = whole({"host_total": NUMBER, "host_peak": NUMBER, **GPU}, "host_peak", *GPU)
ERROR = whole({"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": TEXT})
SPEND = whole(
    {
        "month": TEXT,
        "dollars_this_process": MAYBE_NUMBER,
        "dollars_this_month": MAYBE_NUMBER,
        "counted": TEXT,
        "price": ref("Price"),
        "cap": MAYBE_NUMBER,
        "verdict": ref("Verdict"),
    }
)
READY = {
    "status": {"enum": list(get_args(EngineState))},
    "model": TEXT,
    "drawing": COUNT | {"description": "How many requests are being drawn."},
    "waiting": COUNT | {"description": "How many requests wait."},
    "cold_start": ref("Ledger"),
    "spend": ref("Spend"),
    "workers": array(ref("BoxWorker"), description="Where there are several, each."),
}
WORKER = whole(
    {
        "worker": TEXT,
        "status": READY["status"],
        "reason": TEXT | {"description": "Why it failed, if it has; it is begun again."},
        "drawing": COUNT,
        "device": TEXT,
        "phase": TEXT | {"description": "Of its start, the last one so far."},
        "restarts": COUNT | {"description": "How often it was begun again."},
    }
)
STATUS = {
    "reason": TEXT | {"description": "Why it failed, if it has."},
    "elapsed_s": NUMBER | {"description": "Seconds that its start has taken: so far, or in all."},
    "queue": COUNT | {"description": "How many requests may wait."},
    "machine": MACHINE,
}

ANSWERS: dict[str, Schema] = {
    "Error": whole({"error": ref("Refusal")}),
    "Refusal": ERROR,
    "Job": JOB,
    "JobEvent": {"anyOf": _events(*SAID)["oneOf"]},  # a workflow's last event is one of our own route's too
    "Format": {"enum": list(get_args(Format))},
    "Picture": _picture(PICTURE),
    "NativePicture": _picture(DRAWN),
    "Usage": USAGE,
    "PromptTokens": TOKENS,
    "GenerationEvent": _events("PartialImage", "Progress", "Completed"),
    "EditEvent": _events("PartialEdit", "EditProgress", "CompletedEdit"),
    "FalEvent": _events("PartialImage", "Progress", "FalCompleted"),
    "NativeEvent": _events("PartialImage", "Progress", "NativeCompleted"),
    "Images": whole({"created": COUNT, "data": array(ref("Picture")), **SHARED, **ABOUT}, *SELDOM),
    "NativeImages": whole(NATIVE, *RARE),
    "FalImages": whole(fal.ANSWER | UNKNOWN | DELIVERY | NOTES, *fal.RARE),
    "FalCompleted": whole(_event("image_generation.completed") | fal.ANSWER | UNKNOWN | DELIVERY | NOTES, *fal.RARE),
    "PartialImage": whole(_event("image_generation.partial_image") | PARTIAL),
    "Progress": whole(_event("image_generation.progress") | STEPS),
    "EditProgress": whole(_event("image_edit.progress") | STEPS),
    "Completed": _picture(_event("image_generation.completed") | COMPLETED, *SELDOM),
    "PartialEdit": whole(_event("image_edit.partial_image") | PARTIAL),
    "CompletedEdit": _picture(_event("image_edit.completed") | COMPLETED, *SELDOM),
    "NativeCompleted": whole(_event("image_generation.completed") | NATIVE, *RARE),
    "Model": MODEL,
    "ModelTold": whole({**MODEL["properties"], **ABILITIES}, *ABILITIES),  # of a kept workflow there is no more
    "Ability": whole(FIELD, *FIELD),
    "Models": whole({"object": only("list"), "data": array(ref("Model")), "loras": array(LORA)}),
    "ReceiptAnswer": whole(
        {
            "chips": array(whole({"label": TEXT, "value": TEXT, "measured": TEXT})),
            "reason": TEXT | {"description": "Why in this precision; empty while the worker starts."},
            "receipt": {"anyOf": [ref("Receipt"), NULL]},
            "how": TEXT | {"description": "How to measure, where nobody has."},
            "compile_failure": TEXT | {"description": "Why this worker is eager, if it should have been compiled."},
        },
        "how",
        "compile_failure",
    ),
    "ModelInfo": whole({"model_path": TEXT | {"description": "It may be asked for by this name."}, "model": TEXT}),
    "Live": whole({"status": only("live")}),
    "Ready": whole(READY, "workers"),
    "Status": whole(READY | STATUS, "workers"),
    "BoxWorker": WORKER,
    "Spend": SPEND,
}
