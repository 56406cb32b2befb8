"""ComfyUI's routes and its websocket, over `handler/api/comfy/`."""

SOCKETS = (b"/ws", b"/api/ws", b"/comfy/ws")  # the paths of websockets
