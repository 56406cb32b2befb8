"""The platforms: a row each, with what can be chosen there, and the commands and files that deploy a choice."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from handler.cli.deploy import manifests
from handler.cli.deploy.choice import Choice
from handler.core.version import __version__

KEY = "export KINDLING_API_KEYS=$(openssl rand -hex 16); echo $KINDLING_API_KEYS"
BODY = """-H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'"""
IMAGE = f"kindling:{__version__}"


@dataclass(frozen=True, slots=True)
class Platform:
    """`commands` are those of a choice, whose file, if there is one, is at the path that they are given.

    `lacks` has the options that mean nothing there, and why. Of GPUs that are not asked for the `cheapest` so many are
    rented; `least` workers always run. `note` is what one has to see to there, of the {gpu}.
    """

    commands: Callable[[Choice, str], list[str]]
    lacks: Mapping[str, str] = field(default_factory=dict)
    cheapest: int = 1
    file: str = ""
    made: Callable[[Choice, str], str] | None = None
    least: int = 0
    one_region: bool = False
    budget_s: float = 240
    note: str = ""


def _set(**values: object) -> str:
    """`export` with those that have a value; empty if none has."""
    words = [f"{name}={shlex.quote(str(value))}" for name, value in values.items() if value not in (None, "", "auto")]
    return " ".join(["export", *words]) if words else ""


def _token(choice: Choice) -> str:
    """The hub's token, where a licence wants to be accepted, which is done on the model's page."""
    return "HF_TOKEN=hf_... " if choice.spec.license.gated else ""


def _modal(choice: Choice, _: str) -> list[str]:
    pins = (manifests.platform_folder() / "README.md").read_text()
    install = re.search(r"^pip install modal==.*$", pins, re.M)
    assert install, "the guide installs modal"
    scale = _set(
        MODAL_GPU=",".join(choice.names) if choice.asked else "",
        MODAL_MIN=choice.least,
        MODAL_MAX=choice.most or (manifests.most(choice, 4) if choice.least else None),
        MODAL_REGION=",".join(choice.regions),
    )
    fetch = f"{_token(choice)}modal run platform/modal_app.py::fetch"
    return [
        install[0],
        "modal setup",
        _set(KINDLING_MODEL=choice.spec.id, KINDLING_PRECISION=choice.precision, CUDA=choice.other_build),
        KEY,
        *filter(None, [scale, "" if choice.spec.embedded else fetch]),
        "modal run platform/modal_app.py::bake",
        "modal deploy platform/modal_app.py",
        "curl -sL https://YOU--kindling-kindling-web.modal.run/v1/images/generations "
        f'-H "Authorization: Bearer $KINDLING_API_KEYS" {BODY}',
    ]


def _runpod(choice: Choice, _: str) -> list[str]:
    options = [word for name in choice.names for word in ("--gpu", name)] if choice.asked else []
    for option, value in (("--workers-min", choice.least), ("--workers-max", choice.most)):
        options += [] if value is None else [option, str(value)]
    options += [word for region in choice.regions for word in ("--data-center", region)]
    volume = [] if choice.spec.embedded else ["--volume", "ID"]
    script = ["platform/runpod_deploy.py", choice.spec.id, "--image", f"NAME:{__version__}", *volume, *options]
    fetch = [
        f"# On a pod that mounts a network volume of {choice.volume_gb} GB at /workspace:",
        f"{_token(choice)}KINDLING_VOLUME=/workspace python -m handler fetch {choice.spec.id}",
        "chmod -R a+rwX /workspace",
        "# Here:",
    ]
    return [
        *([] if choice.spec.embedded else fetch),
        f"docker build{choice.build_argument} -t NAME:{__version__} . && docker push NAME:{__version__}",
        *filter(None, [_set(KINDLING_PRECISION=choice.precision, CUDA=choice.other_build)]),
        "export RUNPOD_API_KEY=...",
        f".venv/bin/python {shlex.join(script)}",
        'curl -s "https://api.runpod.ai/v2/ENDPOINT/runsync?wait=300000" -H "Authorization: Bearer $RUNPOD_API_KEY" '
        """-H 'Content-Type: application/json' -d '{"input": {"prompt": "a red circle", "output_format": "webp"}}'""",
    ]


def _fal(choice: Choice, _: str) -> list[str]:
    return [
        "pip install -e '.[fal]'",
        "fal auth login",
        *(["fal secrets set HF_TOKEN=hf_..."] if choice.spec.license.gated else []),
        _set(KINDLING_MODEL=choice.spec.id, KINDLING_PRECISION=choice.precision, CUDA=choice.other_build),
        *([] if choice.spec.embedded else ["fal run platform/fal_app.py::fetch"]),
        "fal deploy platform/fal_app.py::Kindling",
        "fal keys create --preset API",
        "export FAL_KEY=...",
        'curl -s https://fal.run/YOU/kindling/generate -H "Authorization: Key $FAL_KEY" ' + BODY,
    ]


def _kubernetes(choice: Choice, path: str) -> list[str]:
    token = " --from-literal=hf-token=hf_..." if choice.spec.license.gated else ""
    return [
        "helm repo add kedacore https://kedacore.github.io/charts",
        "helm install keda kedacore/keda --namespace keda --create-namespace",
        "helm install http-add-on kedacore/keda-add-ons-http --namespace keda",
        f"docker build{choice.build_argument} -t REGISTRY/{IMAGE} . && docker push REGISTRY/{IMAGE}",
        f"sed -i 's#image: kindling#image: REGISTRY/kindling#' {path}",
        KEY,
        f"kubectl create secret generic kindling --from-literal=api-keys=$KINDLING_API_KEYS{token}",
        f"kubectl apply -f {path}",
        f"kubectl wait --for=condition=complete job/kindling-fetch-{choice.spec.id} --timeout=2h",
        "kubectl port-forward -n keda service/keda-add-ons-http-interceptor-proxy 8080:8080 &",
        "curl -s http://127.0.0.1:8080/v1/images/generations -H 'Host: kindling.local' "
        f'-H "Authorization: Bearer $KINDLING_API_KEYS" {BODY}',
    ]


def _cloudrun(choice: Choice, path: str) -> list[str]:
    region = choice.regions[0] if choice.regions else "us-central1"
    role = "--role=roles"
    fetch = [
        f"{_token(choice)}KINDLING_VOLUME=$HOME/volume .venv/bin/python -m handler fetch {choice.spec.id}",
        "gcloud storage rsync --recursive $HOME/volume gs://$BUCKET",
    ]
    return [
        f"PROJECT=your-project BUCKET=your-bucket REGION={shlex.quote(region)}",
        "IMAGE=$REGION-docker.pkg.dev/$PROJECT/kindling/kindling",
        "ACCOUNT=kindling@$PROJECT.iam.gserviceaccount.com",
        KEY,
        "gcloud config set project $PROJECT",
        "gcloud artifacts repositories create kindling --repository-format=docker --location=$REGION",
        *choice.build_edit,
        f"gcloud builds submit --tag $IMAGE:{__version__}",
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
        f'curl -s https://ADDRESS/v1/images/generations -H "Authorization: Bearer $KINDLING_API_KEYS" {BODY}',
    ]


def _convox(choice: Choice, path: str) -> list[str]:
    token = " HF_TOKEN=hf_..." if choice.spec.license.gated else ""
    fetch = 'convox run web "python -m handler fetch" --release RELEASE --use-service-volume -a kindling'
    return [
        "convox rack params set nvidia_device_plugin_enable=true efs_csi_driver_enable=true cost_tracking_enable=true",
        "convox apps create kindling",
        KEY,
        f"convox env set KINDLING_API_KEYS=$KINDLING_API_KEYS{token} -a kindling",
        *choice.build_edit,
        f"convox build -a kindling -m {path}",
        *([] if choice.spec.embedded else [fetch]),
        'convox run web "python -m handler bake" --release RELEASE --use-service-volume --gpu 1 -a kindling',
        "convox releases promote RELEASE -a kindling",
        "convox services -a kindling",
        "convox budget set kindling --monthly-cap 100 --at-cap-action alert-only",
    ]


def _sky(choice: Choice, path: str) -> list[str]:
    gated = choice.spec.license.gated
    return [
        "pip install 'skypilot[aws]'",
        KEY,
        *(["export HF_TOKEN=hf_..."] if gated else []),
        f"sky serve up -n kindling {path} --secret KINDLING_API_KEYS{' --secret HF_TOKEN' * gated}",
        "sky serve status kindling",
        f'curl -s http://ADDRESS/v1/images/generations -H "Authorization: Bearer $KINDLING_API_KEYS" {BODY}',
    ]


def _docker(choice: Choice, _: str) -> list[str]:
    model = choice.spec.id
    fetch = f"docker run --rm -v kindling:/volume{' -e HF_TOKEN=hf_...' * choice.spec.license.gated} kindling "
    precision = f" -e KINDLING_PRECISION={choice.precision}" * (choice.precision != "auto")
    return [
        f"docker build{choice.build_argument} -t kindling .",
        *([] if choice.spec.embedded else [f"{fetch}python -m handler fetch {model}"]),
        KEY,
        f"docker run -d --gpus all -p 8000:8000 -v kindling:/volume -e KINDLING_DEVICE=cuda -e KINDLING_MODEL={model}"
        f"{precision} -e KINDLING_API_KEYS kindling",
        f'curl -s http://127.0.0.1:8000/v1/images/generations -H "Authorization: Bearer $KINDLING_API_KEYS" {BODY}',
    ]


FAL_SCALE = "it keeps up to 4 runners, by min_concurrency and max_concurrency in platform/fal_app.py"
ONE = "it is one worker on one machine"
PLATFORMS: Mapping[str, Platform] = {
    "modal": Platform(_modal, cheapest=3),
    "runpod": Platform(_runpod, cheapest=3),
    "fal": Platform(
        _fal,
        {
            "gpu": "platform/fal_app.py rents the cheapest machines that hold the model",
            "min": FAL_SCALE,
            "max": FAL_SCALE,
            "region": "fal chooses where its runners are",
        },
        cheapest=3,
    ),
    "kubernetes": Platform(
        _kubernetes,
        {"region": "the cluster is where it is"},
        file="kubernetes.yml",
        made=manifests.kubernetes,
        note="The nodes need {driver}. The file takes any node with a GPU: where some have others than the {gpu}, "
        "add a nodeSelector for your cluster's label: nvidia.com/gpu.product or cloud.google.com/gke-accelerator.",
    ),
    "cloudrun": Platform(
        _cloudrun,
        file="cloudrun.yml",
        made=manifests.cloudrun,
        one_region=True,
        budget_s=220,
        note="The project needs quota for the {gpu} in this region.",
    ),
    "convox": Platform(
        _convox,
        {"region": "the rack is where it is"},
        file="convox.yml",
        made=manifests.convox,
        least=1,
        note="The rack needs nodes with the {gpu}: g6.xlarge has an L4, g5.xlarge an A10G, g6e.2xlarge an L40S.",
    ),
    "sky": Platform(
        _sky,
        {"cuda": "the machines install requirements.txt, which is for CUDA 13"},
        cheapest=4,
        file="sky.yml",
        made=manifests.sky,
        one_region=True,
        note="SkyServe's controller, a small machine, stays on and is paid for.",
    ),
    "docker": Platform(
        _docker,
        {"min": ONE, "max": ONE, "region": "the machine is where it is"},
        note="The machine needs {driver} and NVIDIA's container toolkit.",
    ),
}
