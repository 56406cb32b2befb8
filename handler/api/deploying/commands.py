"""The commands of each platform, in order, as its page in docs/deploy/ explains them."""

import shlex

from handler.api.deploying import manifests
from handler.api.deploying.choice import Choice
from handler.core.version import __version__

KEY = "export KINDLING_API_KEYS=$(openssl rand -hex 16); echo $KINDLING_API_KEYS"
BODY = """-H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'"""
ASK = f"""-H "Authorization: Bearer $KINDLING_API_KEYS" -H 'Accept: image/png' --fail-with-body -o circle.png {BODY}"""
ROUTE = "/v1/images/generations"
APART = "{python} -m venv ~/{name} && . ~/{name}/bin/activate"  # no system's Python, whose pip refuses, nor ours
MODAL = "pip install modal==1.6.4 pydantic==2.14.3"  # as it is tested
IMAGE = f"kindling:{__version__}"


def _set(**values: object) -> str:
    """`export` with those that have a value; empty if none has."""
    words = [f"{name}={shlex.quote(str(value))}" for name, value in values.items() if value not in (None, "", "auto")]
    return " ".join(["export", *words]) if words else ""


def _token(choice: Choice) -> str:
    """The hub's token, where a licence wants to be accepted, which is done on the model's page."""
    return "HF_TOKEN=hf_... " if choice.spec.license.gated else ""


def _argument(choice: Choice, option: str = "--build-arg") -> str:
    """What tells the image's builder the build of torch, where it is not the Dockerfile's own."""
    return f" {option} CUDA={choice.other_build}" if choice.other_build else ""


def _most(choice: Choice) -> int | None:
    """Workers at most, where it has to be said: as asked, or because more always run than usually may."""
    return choice.most or (manifests.most(choice, 4) if choice.least else None)


def modal(choice: Choice, _: str) -> list[str]:
    """For Modal's command line."""
    scale = _set(
        MODAL_GPU=",".join(choice.names) if choice.asked else "",
        MODAL_MAX=_most(choice),
        MODAL_REGION=",".join(choice.regions),
    )
    fetch = f"{_token(choice)}modal run platform/modal_app.py::fetch"
    always = f"MODAL_MIN={choice.least} " if choice.least else ""  # `modal run` would rent them, too, while it fetches
    return [
        APART.format(python="python3", name="modal"),
        MODAL,
        "modal setup",
        _set(KINDLING_MODEL=choice.spec.id, KINDLING_PRECISION=choice.precision, CUDA=choice.other_build),
        KEY,
        *filter(None, [scale, "" if choice.spec.embedded else fetch]),
        "modal run platform/modal_app.py::bake",
        f"{always}modal deploy platform/modal_app.py",
        f"curl -sL https://YOU--kindling-kindling-web.modal.run{ROUTE} {ASK}",
    ]


def runpod(choice: Choice, _: str) -> list[str]:
    """For the script that creates the volume, fills it on a pod, and makes the endpoint."""
    options = [word for name in choice.names for word in ("--gpu", name)] if choice.asked else []
    for option, value in (("--workers-min", choice.least), ("--workers-max", choice.most)):
        options += [] if value is None else [option, str(value)]
    where = choice.regions or (() if choice.spec.embedded else ("EU-RO-1",))  # a volume is in one place
    options += [word for region in where for word in ("--data-center", region)]
    volume = [] if choice.spec.embedded else ["--volume", "kindling", "--size", str(choice.volume_gb), "--fill"]
    script = ["platform/runpod_deploy.py", choice.spec.id, "--image", f"NAME:{__version__}", *volume, *options]
    token = "HF_TOKEN='{{ RUNPOD_SECRET_hub }}' " * choice.spec.license.gated
    return [
        f"docker build{_argument(choice)} -t NAME:{__version__} . && docker push NAME:{__version__}",
        *filter(None, [_set(KINDLING_PRECISION=choice.precision, CUDA=choice.other_build)]),
        "export RUNPOD_API_KEY=...",
        f"{token}.venv/bin/python {shlex.join(script)}",
        'curl -s "https://api.runpod.ai/v2/ENDPOINT/runsync?wait=300000" -H "Authorization: Bearer $RUNPOD_API_KEY" '
        """-H 'Content-Type: application/json' -d '{"input": {"prompt": "a red circle", "output_format": "webp"}}' | """
        """python3 -c "import sys,json,base64;open('circle.webp','wb')"""
        """.write(base64.b64decode(json.load(sys.stdin)['output']['images'][0]['b64_json']))\"""",
    ]


def fal(choice: Choice, _: str) -> list[str]:
    """For fal's command line."""
    counts = (("min", choice.least), ("max", _most(choice)))
    scale = "".join(f" --{name}-concurrency {count}" for name, count in counts if count is not None)
    return [
        APART.format(python="python3.11", name="fal"),  # the image's, which unpickles what is sent
        "pip install -e '.[fal]'",
        "fal auth login",
        *(["fal secrets set HF_TOKEN=hf_..."] if choice.spec.license.gated else []),
        _set(KINDLING_MODEL=choice.spec.id, KINDLING_PRECISION=choice.precision, CUDA=choice.other_build),
        *([] if choice.spec.embedded else ["fal run platform/fal_app.py::fetch"]),
        "fal deploy platform/fal_app.py::Kindling",
        *([f"fal apps scale kindling{scale}"] if scale else []),
        "fal keys create --preset API",
        "export FAL_KEY=...",
        'curl -s https://fal.run/YOU/kindling/generate -H "Authorization: Key $FAL_KEY" ' + BODY,
    ]


def kubernetes(choice: Choice, path: str) -> list[str]:
    """For helm, docker and kubectl, whose manifest is at `path`."""
    token = " --from-literal=hf-token=hf_..." if choice.spec.license.gated else ""
    return [
        "helm repo add kedacore https://kedacore.github.io/charts",
        "helm install keda kedacore/keda --namespace keda --create-namespace",
        "helm install http-add-on kedacore/keda-add-ons-http --namespace keda",
        f"docker build{_argument(choice)} -t REGISTRY/{IMAGE} . && docker push REGISTRY/{IMAGE}",
        f"sed -i 's#image: kindling#image: REGISTRY/kindling#' {path}",
        KEY,
        f"kubectl create secret generic kindling --from-literal=api-keys=$KINDLING_API_KEYS{token}",
        f"kubectl apply -f {path}",
        f"kubectl wait --for=condition=complete job/kindling-fetch-{choice.spec.id} --timeout=2h",
        "kubectl port-forward -n keda service/keda-add-ons-http-interceptor-proxy 8080:8080 &",
        "until curl -s -o /dev/null http://127.0.0.1:8080; do sleep 1; done",
        f"curl -s http://127.0.0.1:8080{ROUTE} -H 'Host: kindling.local' {ASK}",
    ]


def cloudrun(choice: Choice, path: str) -> list[str]:
    """For gcloud, whose manifest is at `path`."""
    region = choice.regions[0] if choice.regions else "europe-west4"  # which has both GPUs, open to all
    role = "--role=roles"
    apis = " ".join(f"{name}.googleapis.com" for name in ("run", "artifactregistry", "cloudbuild", "secretmanager"))
    build = f"_IMAGE=$IMAGE:{__version__},_CUDA={choice.build.name}"
    fetch = [
        f"{_token(choice)}KINDLING_VOLUME=$HOME/volume .venv/bin/python -m handler fetch {choice.spec.id}",
        "gcloud storage rsync --recursive $HOME/volume gs://$BUCKET",
    ]
    return [
        f"PROJECT=your-project BUCKET=your-bucket REGION={shlex.quote(region)}",
        "IMAGE=$REGION-docker.pkg.dev/$PROJECT/kindling/kindling",
        "ACCOUNT=kindling@$PROJECT.iam.gserviceaccount.com",
        KEY,
        "gcloud auth login",
        "gcloud config set project $PROJECT",
        f"gcloud services enable {apis}",
        "gcloud artifacts repositories create kindling --repository-format=docker --location=$REGION",
        f"gcloud builds submit --config=platform/cloudbuild.yml --substitutions={build}",
        "gcloud storage buckets create gs://$BUCKET --location=$REGION --uniform-bucket-level-access "
        "--enable-hierarchical-namespace",
        "printf $KINDLING_API_KEYS | gcloud secrets create kindling-api-keys --data-file=-",
        "gcloud iam service-accounts create kindling",
        f"gcloud secrets add-iam-policy-binding kindling-api-keys {role}/secretmanager.secretAccessor "
        "--member=serviceAccount:$ACCOUNT",
        f"gcloud storage buckets add-iam-policy-binding gs://$BUCKET {role}/storage.objectUser "
        "--member=serviceAccount:$ACCOUNT",
        *([] if choice.spec.embedded else fetch),
        'sed -i "s#image: kindling#image: $IMAGE#; s#@PROJECT#@$PROJECT#; s#bucketName: kindling#bucketName: $BUCKET#" '
        + path,
        f"gcloud run services replace {path} --region=$REGION",
        "ADDRESS=$(gcloud run services describe kindling --region=$REGION --format='value(status.url)')",
        f"curl -s $ADDRESS{ROUTE} {ASK}",
    ]


def convox(choice: Choice, path: str) -> list[str]:
    """For Convox's command line, whose manifest is at `path`."""
    token = " HF_TOKEN=hf_..." if choice.spec.license.gated else ""
    fetch = 'convox run web "python -m handler fetch" --release RELEASE --use-service-volume -a kindling'
    return [
        "convox rack params set nvidia_device_plugin_enable=true efs_csi_driver_enable=true cost_tracking_enable=true",
        "convox apps create kindling",
        KEY,
        f"convox env set KINDLING_API_KEYS=$KINDLING_API_KEYS{token} -a kindling",
        f"convox build -a kindling -m {path}{_argument(choice, '--build-args')}",
        *([] if choice.spec.embedded else [fetch]),
        'convox run web "python -m handler bake" --release RELEASE --use-service-volume --gpu 1 -a kindling',
        "convox releases promote RELEASE -a kindling",
        "convox services -a kindling",
        "convox budget set kindling --monthly-cap 100 --at-cap-action alert-only",
        f"curl -s https://ADDRESS{ROUTE} {ASK}",
    ]


def sky(choice: Choice, path: str) -> list[str]:
    """For SkyPilot's command line, whose manifest is at `path`."""
    gated = choice.spec.license.gated
    return [
        APART.format(python="python3", name="sky"),
        "pip install 'skypilot[aws]'",
        "sky check",
        KEY,
        *(["export HF_TOKEN=hf_..."] if gated else []),
        f"sky serve up -n kindling {path} --secret KINDLING_API_KEYS{' --secret HF_TOKEN' * gated}",
        "sky serve status kindling",
        f"curl -s http://ADDRESS{ROUTE} {ASK}",
    ]


def docker(choice: Choice, _: str) -> list[str]:
    """For a machine of one's own."""
    model = choice.spec.id
    fetch = f"docker run --rm -v kindling:/volume{' -e HF_TOKEN=hf_...' * choice.spec.license.gated} kindling "
    precision = f" -e KINDLING_PRECISION={choice.precision}" * (choice.precision != "auto")
    return [
        f"docker build{_argument(choice)} -t kindling .",
        *([] if choice.spec.embedded else [f"{fetch}python -m handler fetch {model}"]),
        KEY,
        "docker run -d --name kindling --gpus all -p 8000:8000 -v kindling:/volume -e KINDLING_DEVICE=cuda "
        f"-e KINDLING_MODEL={model}{precision} -e KINDLING_API_KEYS kindling",
        "until curl -s http://127.0.0.1:8000/ping; do sleep 1; done",
        f"curl -s http://127.0.0.1:8000{ROUTE} {ASK}",
    ]
