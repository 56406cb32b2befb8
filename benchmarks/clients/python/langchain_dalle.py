"""LangChain's wrapper, told the model and that pictures come as base64, for a worker without a store has no URLs."""

import os

from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

wrapper = DallEAPIWrapper(
    api_key="unused", base_url=os.environ["URL"] + "/v1", model="spark", size="256x256",
    model_kwargs={"response_format": "b64_json"},
)  # fmt: skip
answer = wrapper.client.generate(
    prompt="x", model=wrapper.model_name, size=wrapper.size, response_format="b64_json", n=wrapper.n
)
assert answer.data[0].b64_json
