"""OpenAI's SDK, from its first images of version 1 on: draw, edit, list models, be refused."""

import base64
import os

import openai

client = openai.OpenAI(api_key="unused", base_url=os.environ["URL"] + "/v1", max_retries=0)
answer = client.images.generate(model="spark", prompt="x", size="256x256", response_format="b64_json", n=2)
first, _ = (base64.b64decode(picture.b64_json) for picture in answer.data)
edited = client.images.edit(image=first, prompt="a red circle", model="spark", response_format="b64_json")
assert edited.data[0].b64_json
assert "spark" in [model.id for model in client.models.list()]
try:
    client.images.generate(prompt="x", model="dall-e-7")
except openai.NotFoundError as error:
    told = str(error)
assert "serves spark" in told
