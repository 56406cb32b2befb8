"""The guides, held by test: each command they show is run here as it is written, or its place is listed here."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import forked
from serving import Served

pytestmark = pytest.mark.random_order(disabled=True)  # a command's picture is the next one's
ROOT = Path(__file__).parent.parent
GUIDES = (
    *("README.md", "platform/README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
)
FENCE = re.compile(r"^( *)```(sh|python)\n(.*?)^\1```$", re.M | re.S)
PROGRAMS = "python3?|pip|make|modal|fal|docker|kubectl|helm|gcloud|convox|sky|runpodctl|curl"
INLINE = re.compile(rf"`((?:[A-Z_]+=\S+ )*(?:\S*/)?(?:{PROGRAMS}) [^`]+)`")
SHELLS = re.compile(r"[|&;<>$`*~]")
ADDRESS = re.compile(r"https?://(?:127\.0\.0\.1:8000|YOU--[\w-]+\.modal\.run)")

# How a command starts, and what is added to run it here: all of it, or what it does without time, network or account.
RUN = {
    ".venv/bin/python -m handler generate": "",
    ".venv/bin/python -m spark.train": " --help",
    "HF_TOKEN='{{ RUNPOD_SECRET_hub }}' .venv/bin/python platform/runpod_deploy.py": " --dry-run",
    "curl -s http://127.0.0.1:8000": "",
    "curl -sL https://YOU--kindling-kindling-web.modal.run": "",
    "KINDLING_FETCH_HOSTS=images.example": " --dry-run",
    "KINDLING_STORE_BUCKET=pictures": " --dry-run",
    "export ": "",
    "make ": " --dry-run",
    "python -c": "",
    "modal app ": " --help",
    "modal secret create ": " --help",
    "modal setup": " --help",
    "pip install fastapi": " --dry-run --no-index",
    "until curl -s http://127.0.0.1:8000": "",
    "pip install modal==": " --dry-run --no-index",  # are those the versions that are tested?
    "python -m handler deploy": "",
    "python -m handler doctor": "",
    "python -m handler models": "",
    "python benchmarks/": " --help",
    "python platform/runpod_deploy.py": " --dry-run",
}
TESTED = {
    "HF_TOKEN=hf_... modal run platform/modal_app.py::fetch": "platform/test_modal_deploy.py::test_modal_run",
    "KINDLING_MODEL=spark KINDLING_DEVICE=cpu fal run --local": "platform/test_fal_app.py::local",
    "KINDLING_VOLUME=$HOME/volume .venv/bin/python -m handler fetch": "volume/test_fetch.py::test_the_command_brings",
    "KINDLING_MODEL=flux-dev KINDLING_ULYSSES": "worker/test_ranks.py::test_every_family_that_can",
    "KINDLING_MODEL=flux-schnell python -m handler serve --workers auto": (
        "engine/test_box.py::test_health_and_metrics_tell_of_each_worker"
    ),
    "python benchmarks/fleet.py --platform": "benchmarks/test_fleet.py::test_the_guide_shows_what_it_prints",
    "python benchmarks/fleet.py --gpus": "benchmarks/test_fleet.py::test_the_guide_shows_what_it_prints",
    "KINDLING_COMFY_UI=on python -m handler serve": "server/test_editor_page.py::test_a_workflow_is_opened",
    "HF_TOKEN=hf_... KINDLING_VOLUME=/workspace python -m handler fetch": (
        "volume/test_fetch.py::test_the_command_brings"
    ),
    "modal deploy platform/modal_app.py": "platform/test_modal_deploy.py::deployed",
    "modal run platform/modal_app.py::": "platform/test_modal_deploy.py::test_modal_run",
    "curl -s http://127.0.0.1:8000/images/": "server/test_mounted.py::test_the_app_of_the_guide_serves",
    ".venv/bin/pip install comfyui-frontend-package==": "server/test_comfy_editor.py::test_the_guide_names_the_version",
    "pip install /path/to/kindling": "test_wheel.py::test_installed_it_draws_from_an_empty_folder",
    "uvicorn app:app": "server/test_mounted.py::test_the_app_of_the_guide_serves",
    "python -m handler comfy explain": "cli/test_comfy_acts.py::test_a_report_for_people",
    "python -m handler comfy run": "cli/test_comfy_acts.py::test_run_draws_what_a_server_draws",
    "curl -s http://127.0.0.1:8000/workflows": "server/test_workflows.py::test_the_guides_commands_and_openais_client",
    "python -m handler comfy add": "cli/test_comfy_add.py::test_a_file_is_kept",
    "python -m handler comfy list": "cli/test_comfy_add.py::test_a_file_is_kept",
    "python -m handler comfy remove": "cli/test_comfy_add.py::test_a_file_is_kept",
    "ray get-auth-token --generate": "platform/test_ray_app.py::test_the_guides_commands_serve",
    "ray start --head": "platform/test_ray_app.py::test_the_guides_commands_serve",
    "serve run --app-dir platform": "platform/test_ray_app.py::test_the_guides_commands_serve",
    "python -m handler bake": "cli/test_bake.py::test_what_is_baked_is_used_and_draws_the_same",
    "python -m handler fetch": "volume/test_fetch.py::test_the_command_brings",
    "KINDLING_MODEL=sdxl KINDLING_WEIGHTS=merge.safetensors": "cli/test_files.py::test_both_verbs_list_them",
    "KINDLING_MODEL=sdxl KINDLING_WEIGHTS=checkpoints/my-model": (
        "model/test_folders.py::test_what_a_folder_lacks_comes_from_the_row"
    ),
    'python -m handler generate "put the hat': "api/test_images.py::test_made_again_bit_for_bit",
    "python -m handler comfy convert": "cli/test_comfy_convert.py::test_a_file_is_written_in_api_format",
    "python -m handler optimize": "cli/test_optimize.py::test_a_real_sweep",
    "python -m handler receipts": "volume/test_receipts.py::test_the_verb",
    "python -m spark.lora": "spark/test_outlined.py::test_what_was_trained_is_what_is_applied",
}
ELSEWHERE = (  # these want an account, a cluster or a container engine; test_vendor_clis.py has what their tools know
    *("convox ", "docker ", "gcloud ", "helm ", "kubectl ", "runpodctl ", "sky ", "printf $KINDLING_API_KEYS | gcloud"),
    "FAL_RUN_HOST=images.example",
    "modal volume put ",
    "fal ",  # tests/platform/test_fal_app.py asks fal's own command line whether it knows these
    *("pip install -e '.[fal]'", "pip install -e '.[ray]'", "pip install 'skypilot[aws]'"),
    *("python3 -m venv ~/", "python3.11 -m venv ~/"),  # and these would leave something at home
    *("PROJECT=", "IMAGE=", "ACCOUNT=", "ADDRESS="),
    *("curl -s $ADDRESS", "curl -s https://ADDRESS", "curl -s http://ADDRESS", "curl -s http://127.0.0.1:8080"),
    "until curl -s -o /dev/null http://127.0.0.1:8080",
    *('curl -s "https://api.runpod.ai', "curl -s https://fal.run/YOU"),
    ".venv/ray/bin/python benchmarks/",  # in the environment that has Ray
    "sed -i ",  # of the manifests, which test_container.py looks at
)
ANSWERED = [
    *("Keys", "Idle", "A cold start that failed", "Another model, and back", "Scale", "Object store", "ComfyUI"),
]


def in_blocks(text: str) -> Iterator[str]:
    """The shell commands of a guide's blocks, a line each, without their remarks."""
    for indent, language, block in FENCE.findall(text):
        whole = re.sub(r"\\\n *", "", re.sub(rf"^{indent}", "", block, flags=re.M))
        for line in re.sub(r"\|\n *", "| ", whole).splitlines() if language == "sh" else ():
            yield re.sub(r"(^|\s+)# .*", "", line).strip()


def commands(text: str) -> Iterator[str]:
    """Those of its blocks, and those in its prose."""
    yield from in_blocks(text)
    for found in INLINE.findall(FENCE.sub("", text)):
        yield re.sub(r"\s+", " ", found)


TEXTS = {guide: (ROOT / guide).read_text() for guide in GUIDES}
COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text) if command))


def place(command: str) -> str:
    """The longest start that is listed, of those that `command` has."""
    return max((start for start in [*RUN, *TESTED, *ELSEWHERE] if command.startswith(start)), key=len, default="")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_place(command: str) -> None:
    assert place(command), "add it to RUN, TESTED or ELSEWHERE"


def test_no_place_is_left_over() -> None:
    assert {place(command) for command in COMMANDS} >= {*RUN, *TESTED, *ELSEWHERE}


@pytest.mark.parametrize("where", sorted(set(TESTED.values())))
def test_places_exist(where: str) -> None:
    file, test = where.split("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's, for pictures to fall into."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in [path for path in ROOT.iterdir() if path.name != ".venv"]:
        (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(command: list[str], checkout: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KINDLING_", "MODAL_"))}
    options = {"cwd": checkout, "capture_output": True, "text": True, "timeout": 300}
    if command[0] == sys.executable:
        done = forked.run(command, env=kept, **options)
    else:
        environment = {**kept, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [command for command in COMMANDS if place(command) in RUN])
def test_runs_as_written(command: str, checkout: Path, server: Served) -> None:
    here = ADDRESS.sub(server.url, command) + RUN[place(command)]
    if here.startswith("python ") and not SHELLS.search(here):  # a shell would add nothing
        run([sys.executable, *shlex.split(here)[1:]], checkout)
    else:
        run(["bash", "-o", "pipefail", "-c", here], checkout)


def test_the_first_request_writes_a_picture_by_itself(checkout: Path, server: Served) -> None:
    first = next(command for command in commands(TEXTS["README.md"]) if command.startswith("curl "))
    run(["bash", "-c", ADDRESS.sub(server.url, first)], checkout)
    assert (checkout / "stars.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def programs() -> list[str]:
    return [block for text in TEXTS.values() for _, language, block in FENCE.findall(text) if language == "python"]


@pytest.mark.parametrize("program", programs())
def test_programs_run_as_written(program: str, checkout: Path, server: Served) -> None:
    run([sys.executable, "-c", ADDRESS.sub(server.url, program)], checkout)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/deploy").glob("[a-z]*.md")), ids=lambda page: page.stem)
def test_each_platforms_page_answers_the_same_questions(page: Path) -> None:
    found = re.findall(r"^## (.+)$", page.read_text(), re.M)
    assert found[0].endswith("first picture")
    assert [one for one in found[1:] if one in ANSWERED] == ANSWERED


def test_links_lead_somewhere() -> None:
    for guide, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (ROOT / guide).parent.joinpath(target).exists(), f"{guide}: {target}"
