"""Names for every type that a description has, so that no generator of clients has to number them.

Generators make a type of each object and each choice of words, and call it what its field is called: two fields of one
name, two types, and the second gets a number. So here each becomes a component, and what is equal is one. They also
take a field with a default for one that is always there, so none has one: `worded` says it in the description.
"""

import json

from handler.server.openapi.schema import NULL, Schema, ref

BESIDE = ("description", "examples")  # what is said of a field, not of its type


def worded(schema: Schema) -> Schema:
    """A schema of what comes in, whose defaults are said in words."""
    fields = {name: _told(each) for name, each in schema.get("properties", {}).items()}
    return schema | ({"properties": fields} if fields else {})


def _told(field: Schema) -> Schema:
    found = {name: value for name, value in worded(field).items() if name != "default"}
    if "anyOf" in found:
        found["anyOf"] = [worded(each) for each in found["anyOf"]]
    if field.get("default") in (None, [], ()):
        return found
    words = f"{field.get('description', '')} Default: {json.dumps(field['default'])}."
    return found | {"description": words.strip()}


def named(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """Components, and those that their fields' types become."""
    names = _Names(schemas)
    return {name: names.inside(schema, name, name) for name, schema in schemas.items()} | names.found


class _Names:
    """The types that fields have, `found` so far. A name goes to the first type that wants it."""

    def __init__(self, given: dict[str, Schema]) -> None:
        self.found: dict[str, Schema] = {}
        self._given = given

    def inside(self, schema: Schema, owner: str, wanted: str) -> Schema:
        """`schema`, with a reference to each type in it; `owner` is the component it is in, `wanted` its name."""
        made = {name: value for name, value in schema.items() if name not in ("default", "title")}
        if "properties" in made:
            made["properties"] = {
                name: self._type(each, owner, name.title().replace("_", ""))
                for name, each in made["properties"].items()
            }
        if "items" in made:
            made["items"] = self._type(made["items"], owner, wanted.removesuffix("s"))
        for several in ("anyOf", "oneOf"):
            if several in made:
                made[several] = [self._type(each, owner, wanted) for each in made[several]]
        return _choice(made) if "enum" in made else made

    def _type(self, schema: Schema, owner: str, wanted: str) -> Schema:
        made = self.inside(schema, owner, wanted)
        if "enum" not in made and "properties" not in made:
            return made
        kind = {name: value for name, value in made.items() if name not in BESIDE}
        return ref(self._name(kind, owner, wanted)) | {name: made[name] for name in BESIDE if name in made}

    def _name(self, kind: Schema, owner: str, wanted: str) -> str:
        """The one that `kind` has or gets: with its owner's before it, if another has it."""
        if known := next((name for name, each in self.found.items() if each == kind and name.endswith(wanted)), None):
            return known
        for name in (wanted, owner + wanted):
            if name not in self._given and self.found.setdefault(name, kind) == kind:
                return name
        raise ValueError(f"two types would be called {owner}{wanted}")


def _choice(schema: Schema) -> Schema:
    """A choice of words, with their type."""
    kind = {"type": "string"} if all(isinstance(value, str) for value in schema["enum"]) else {}
    return kind | schema


def optional(kind: Schema) -> Schema:
    """What may be null too: that counts as not sent."""
    if isinstance(kind.get("type"), str) and not kind.keys() & {"enum", "properties"}:
        return kind | {"type": [kind["type"], "null"]}
    return {"anyOf": [kind, NULL]}
