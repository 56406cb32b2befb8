"""Prompts as ComfyUI reads them, for recipes with a `Reading`: pieces, chunks of tokens, hidden states, two prompts."""
