"""Words for JSON Schemas, which `requests.py` and `responses.py` speak."""

from typing import Any, get_args

from handler.core.request import Format

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"
TEXT, NUMBER, COUNT, NULL = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "null"}
FORMAT = {"enum": list(get_args(Format))}


def ref(name: str) -> Schema:
    """A schema of the components."""
    return {"$ref": REF.format(model=name)}


def array(items: Schema, **more: Any) -> Schema:
    """Any number of `items`, unless `more` says otherwise."""
    return {"type": "array", "items": items, **more}


def whole(fields: Schema, *optional: str) -> Schema:
    """An object that has these fields, all but `optional` always."""
    return {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}


def closed(fields: Schema, required: tuple[str, ...], rules: list[Schema]) -> Schema:
    """An object that has these fields and no others, and keeps to the rules."""
    return {
        "type": "object",
        "properties": dict(sorted(fields.items())),
        "required": list(required),
        "additionalProperties": False,
        **({"allOf": rules} if rules else {}),
    }
