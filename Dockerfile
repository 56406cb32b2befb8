# One image for RunPod, fal, Kubernetes, Cloud Run, Convox or your own GPU machine. No weights inside: they live on the
# volume, except for the embedded spark. The CUDA libraries come with torch, the headers that compiling needs beside them;
# the driver comes from the host.
#
#   docker build -t kindling .                          # needs a driver of 580 or newer
#   docker build -t kindling --build-arg CUDA=cu126 .   # needs one of 525 or newer, and no Blackwell GPU
#   docker run --rm -v kindling:/volume -e HF_TOKEN=hf_... kindling python -m handler fetch flux-schnell
#   docker run --gpus all -p 8000:8000 -v kindling:/volume -e KINDLING_MODEL=flux-schnell -e KINDLING_API_KEYS=$(openssl rand -hex 16) kindling
#
FROM python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3

# A platform that chooses the port says so in PORT.
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PORT=8000
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl g++ libc6-dev tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 kindling \
    && install -d -o kindling /volume
WORKDIR /app

# What is large and changes seldom comes first: torch with CUDA's libraries, for PyPI's build by version and hash, for
# another by its index and version. Nothing loads or links what is deleted: what profilers and debuggers of Triton's use,
# code for several GPUs' linear algebra, a second NVRTC, a compiler of protocols. Symbols for debuggers go too.
ARG CUDA=cu130
COPY "platform/locks/torch-$CUDA.lock" platform/locks/
RUN pip install -r "platform/locks/torch-$CUDA.lock" \
    && cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && find nvidia torch/bin triton -type f \( -path '*/lib/cupti/*' -o -path 'triton/instrumentation/*.so' \
        -o -path 'triton/plugins/*' -o -name FileCheck -o -name libproton.so -o -name 'libcusolverMg.so.*' \
        -o -name 'libnvrtc*.alt.so.*' -o -name 'libnvblas.so.*' -o -name 'libnvshmem_device.*' -o -name 'protoc*' \) \
        -delete \
    && strip --strip-unneeded triton/_C/libtriton.so nvidia/nccl/lib/libnccl.so.2

# Then all else, by version and hash. RunPod's SDK and fal's cannot live in one image; platform/fal_app.py asks for fal's.
ARG SDK=runpod
COPY platform/locks platform/locks
RUN pip install --no-deps --require-hashes -r "platform/locks/$SDK.lock"

COPY pyproject.toml requirements.txt ./
COPY handler handler
COPY platform platform
# What is imported from here is compiled too; the import leaves beside byte code what it finds in transformers' models, so
# no start looks for it; and what a start touches is written down, for a page cache that is cold.
RUN pip install --no-deps . \
    && python -m compileall -q handler platform \
    && python -c "import handler.model.families" \
    && python -c "from handler.worker import touched; touched.record()"

# A worker that sees no GPU then fails, rather than draw on the CPU, but where KINDLING_DEVICE says so.
ENV IMAGE_CUDA=$CUDA
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
