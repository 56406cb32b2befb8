"""diffusers behind FastAPI: one picture at a time on a thread, its PNG made while the next one is drawn.

`PORT=8000 python fastapi_server.py`, with COMPILED=1 by torch.compile.
"""

import os
import threading

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

import plainly

plainly.hide()
app, one = FastAPI(), threading.Lock()
pipeline = plainly.loaded(os.environ.get("COMPILED") == "1")


class Asked(BaseModel):
    prompt: str
    size: str = "256x256"
    n: int = 1
    seed: int = 0
    num_inference_steps: int = 4


@app.post(plainly.ROUTE)
def generate(asked: Asked) -> JSONResponse:
    seeds = range(asked.seed, asked.seed + asked.n)
    with one:
        images = plainly.drawn(pipeline, [asked.prompt], asked.n, seeds, asked.size, asked.num_inference_steps)
    return JSONResponse(plainly.answer(images))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=plainly.port(), log_level="warning", access_log=False)
