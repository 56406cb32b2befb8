"""diffusers behind LitServe, which puts requests that wait into one batch: `PORT=8000 python litserve_server.py`."""

from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import litserve

import plainly

MOST = 8  # requests in a batch, as Kindling draws at once at most
WAIT_S = 0.001  # for a batch to fill: what a client alone pays; under load requests wait anyhow


class Pictures(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        plainly.hide()
        self.pipeline = plainly.loaded()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"size": "256x256", "n": 1, "seed": 0, "num_inference_steps": 4, **request}

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: list[dict[str, Any]]) -> list[list[Any]]:
        """The pictures of each request; neighbours that differ in prompt and seed alone are drawn at once."""
        found = []
        for (n, size, steps), group in groupby(batch, itemgetter("n", "size", "num_inference_steps")):
            alike = [*group]
            seeds = [each["seed"] + i for each in alike for i in range(n)]
            images = iter(plainly.drawn(self.pipeline, [each["prompt"] for each in alike], n, seeds, size, steps))
            found += [[*islice(images, n)] for _ in alike]
        return found

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: list[Any]) -> dict[str, Any]:
        return plainly.answer(output)


if __name__ == "__main__":
    api = Pictures(max_batch_size=MOST, batch_timeout=WAIT_S, api_path=plainly.ROUTE)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host="127.0.0.1", port=plainly.port(), log_level="warning", generate_client_file=False)
