"""ComfyUI's routes and its websocket, over `handler/api/comfy/`."""
