"""Models that datamodel-codegen made: the smallest request, with what it leaves out and without, and the answer."""

import os

import httpx
from made.datamodel_codegen import GenerationRequest, Images

for unset in (True, False):
    body = GenerationRequest(prompt="x").model_dump_json(exclude_unset=unset).encode()
    url, headers = os.environ["URL"] + "/v1/images/generations", {"content-type": "application/json"}
    answer = httpx.post(url, content=body, headers=headers, timeout=60)
    assert Images.model_validate_json(answer.content).data[0].b64_json
