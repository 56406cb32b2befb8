"""LiteLLM's SDK, with an OpenAI-compatible server."""

import os

import litellm

answer = litellm.image_generation(
    model="openai/spark", prompt="x", size="256x256", api_base=os.environ["URL"] + "/v1", api_key="unused"
)
assert answer.data[0].b64_json
