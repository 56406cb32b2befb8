"""The ways to ask: each dialect is a module with two pure functions.

    parse(payload)                                  JSON object -> ImageRequest, or the error naming the field
    render(request, spec, pictures, seconds)        what was drawn -> JSON object

Dialects know no HTTP, no queue and no model; `api.py` brings them together.
"""
