"""Kept ComfyUI workflows, each of which is an endpoint with fields of its own."""
