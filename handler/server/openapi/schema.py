"""Words for JSON Schemas, which `requests.py` and `responses.py` speak."""

from typing import Any

Schema = dict[str, Any]
REF = "#/components/schemas/{model}"
TEXT, NUMBER, COUNT, NULL = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "null"}


def ref(name: str) -> Schema:
    """A schema of the components."""
    return {"$ref": REF.format(model=name)}


def only(word: str) -> Schema:
    """One word, always."""
    return {"type": "string", "const": word}


def array(items: Schema, **more: Any) -> Schema:
    """Any number of `items`, unless `more` says otherwise."""
    return {"type": "array", "items": items, **more}


def whole(fields: Schema, *optional: str) -> Schema:
    """An object that has these fields, all but `optional` always."""
    return {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}


def closed(fields: Schema, required: tuple[str, ...], rules: list[Schema]) -> Schema:
    """An object that has these fields and no others, and keeps to the rules.

    The rules are said where generators of clients do not look: they would make a type of each, and of all ways to keep
    to them. What a field that is always there depends on says the same.
    """
    return {
        "type": "object",
        "properties": dict(sorted(fields.items())),
        "required": list(required),
        "additionalProperties": False,
        **({"dependentSchemas": {key: {"allOf": rules} for key in required[-1:] or fields}} if rules else {}),
    }
