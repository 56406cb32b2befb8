# One image for RunPod, fal, Kubernetes, Cloud Run, Convox or your own GPU machine. No weights inside: they live on the
# volume, except for the embedded spark. The CUDA libraries come with torch, the headers that compiling needs beside them
# with requirements.txt; the driver comes from the host.
#
#   docker build -t kindling .
#   docker run --rm -v kindling:/volume kindling python -m handler fetch flux-schnell
#   docker run --gpus all -p 8000:8000 -v kindling:/volume -e KINDLING_MODEL=flux-schnell -e KINDLING_API_KEYS=secret kindling
#
FROM python:3.11.14-slim-bookworm

# A platform that chooses the port says so in PORT.
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PORT=8000
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl g++ libc6-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 kindling \
    && install -d -o kindling /volume
WORKDIR /app

# What changes seldom comes first, all by version and hash. RunPod's SDK and fal's cannot live in one image;
# platform/fal_app.py asks for fal's.
COPY platform/locks platform/locks
RUN pip install --require-hashes -r platform/locks/requirements.lock
ARG SDK=runpod
RUN pip install --require-hashes -r "platform/locks/$SDK.lock"

COPY pyproject.toml requirements.txt ./
COPY handler handler
COPY platform platform
RUN pip install --no-deps .

# kindling, by its number: Kubernetes cannot tell from a name that it is not root.
USER 1000
EXPOSE 8000
# Weights may load for up to the cold-start budget of 240 s before the first check counts. A worker of RunPod's queue has no
# port; it tells RunPod itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=250s \
    CMD ["python", "-c", "import os, urllib.request as u; os.environ.get('RUNPOD_WEBHOOK_GET_JOB') or u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health/live')"]
# What is told to stop before Python listens ends too: the kernel drops such a signal for a container's first process, which
# tini is.
ENTRYPOINT ["tini", "--"]
# A worker of RunPod's queue takes jobs, all others serve HTTP. `exec`, so that SIGTERM reaches Python, which drains.
CMD ["sh", "-c", "if [ \"$RUNPOD_WEBHOOK_GET_JOB\" ]; then exec python -u platform/runpod_worker.py; fi; exec python -m handler serve --host 0.0.0.0 --port $PORT"]
