"""ComfyUI's UI format, what its page saves, made API format as the page itself does it before it asks the server."""
