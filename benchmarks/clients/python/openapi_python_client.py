"""A client that openapi-python-client made."""

import os

from kindling_spark_client import Client
from kindling_spark_client.api.default import post_v1_images_generations as generations
from kindling_spark_client.models import GenerationRequest, Images

client = Client(base_url=os.environ["URL"], timeout=60)
answer = generations.sync(client=client, body=GenerationRequest(prompt="x"))
assert isinstance(answer, Images), answer
assert answer.data[0].b64_json
