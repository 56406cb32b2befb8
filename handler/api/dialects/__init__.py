"""The ways to ask: each dialect is a module with four functions.

    parse(payload)                                  JSON object -> ImageRequest, or the error naming the field
    render(request, spec, pictures, seconds)        what was drawn -> JSON object, with `File`s in it
    partial(request, data, size, index)             an encoded preview -> JSON object, for transports that stream
    completed(answer)                               a rendered answer -> the JSON objects that end a stream

Dialects know no HTTP, no queue and no model; `dispatch.py` brings them together.
"""
