"""ComfyUI's graphs: checked as ComfyUI checks them, and read as requests. No node is ever executed."""
