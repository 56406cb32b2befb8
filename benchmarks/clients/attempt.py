"""Run other people's clients against a worker: `python benchmarks/clients/attempt.py http://127.0.0.1:8000`.

Each gets an environment of its own, from the package indexes, below `--at`; none gets into Kindling's. What came of it,
with versions, goes to benchmarks/results/clients.json, which docs/clients.md is made of. Needs Node.js and its npm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx

HERE = Path(__file__).parent
RESULT = HERE.parent / "results/clients.json"
STRICT = ("--strict", "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler", "--noEmit")
TSC = ("npx", "tsc", *STRICT, "--skipLibCheck", "--types", "node")
TYPESCRIPT = ("typescript@5.9", "tsx", "@types/node")


@dataclass(frozen=True)
class Client:
    """`package` is the first of `needs`; `script` is run after `before`; `what` it does, in words."""

    name: str
    needs: tuple[str, ...]
    script: str
    what: str
    before: tuple[str, ...] = ()
    version: str = ""  # where it is not that of a package which is installed

    @property
    def package(self) -> str:
        """Without its version."""
        return self.needs[0][:1] + self.needs[0][1:].partition("@")[0].partition("==")[0]

    @property
    def node(self) -> bool:
        """Whether it is for Node.js."""
        return self.script.endswith(".ts")


SMALLEST = "generated at its defaults; the smallest request compiles and draws"
SDK = "draws, edits, lists models"
CLIENTS = (
    Client(
        "openapi-typescript", ("openapi-typescript", "openapi-fetch"), "openapi-typescript.ts", SMALLEST,
        ("npx", "openapi-typescript", "openapi.json", "-o", "made/openapi-typescript.d.ts"),
    ),
    Client("oazapfts", ("oazapfts",), "oazapfts.ts", SMALLEST, ("npx", "oazapfts", "openapi.json", "made/oazapfts.ts")),
    Client(
        "Hey API", ("@hey-api/openapi-ts",), "hey-api.ts", SMALLEST,
        ("npx", "openapi-ts", "-i", "openapi.json", "-o", "made/hey-api"),
    ),
    Client(
        "orval", ("orval@7.13.2", "axios@1.7.9"), "orval.ts", SMALLEST,
        ("npx", "orval", "--input", "openapi.json", "--output", "made/orval.ts"),
    ),
    Client(
        "datamodel-codegen", ("datamodel-code-generator",), "generated.py", SMALLEST,
        ("bin/datamodel-codegen", "--input", "openapi.json", "--input-file-type", "openapi",
         "--output", "made/datamodel_codegen.py"),
    ),
    Client(
        "openapi-python-client", ("openapi-python-client",), "openapi_python_client.py", SMALLEST,
        ("bin/openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none", "--overwrite",
         "--output-path", "kindling_spark_client"),
    ),
    Client("OpenAI, Python", ("openai==1.3.9", "httpx<0.28"), "openai_sdk.py", SDK),
    Client("OpenAI, Python", ("openai",), "openai_sdk.py", SDK),
    Client("OpenAI, Node", ("openai@4",), "openai.ts", SDK),
    Client("OpenAI, Node", ("openai",), "openai.ts", SDK),
    Client("AI SDK", ("@ai-sdk/openai-compatible@2", "ai@6"), "ai-sdk.ts", "draws"),
    Client(
        "SGLang's `bench_serving`", ("aiohttp", "numpy", "requests", "tqdm", "pillow"), "sglang_bench.py",
        "`--backend sglang-image --task t2v`, unmodified: every row of its report",
        ("bin/pip", "install", "-q", "--no-deps", "--target", "sglang", "sglang==0.5.7"), "0.5.7",
    ),
    Client("LiteLLM", ("litellm",), "litellm_sdk.py", "draws"),
    Client("LangChain's DallEAPIWrapper", ("langchain-community", "openai"), "langchain_dalle.py", "draws, as base64"),
)  # fmt: skip


def main() -> int:
    """The exit code: 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the worker's address")
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir()) / "kindling-clients")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    options = parser.parse_args()
    known = {(row["name"], row["version"]): row for row in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    fine = True
    for i, client in enumerate(CLIENTS):
        if options.only.lower() not in client.name.lower():
            continue
        version, error = attempted(client, options.at / str(i), options.url.rstrip("/"))
        fine &= not error
        print(f"{client.name} {version}: {error or 'works'}", flush=True)
        row = {"name": client.name, "version": version, "package": client.package, "what": client.what}
        known[client.name, version] = row | {"works": not error, "on": f"{datetime.now(UTC):%Y-%m-%d}"}
        rows = sorted(known.values(), key=lambda row: (str(row["name"]).lower(), row["version"]))
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    return not fine


def attempted(client: Client, at: Path, url: str) -> tuple[str, str]:
    """Which version was tried, and why it failed if it did."""
    (at / "made").mkdir(parents=True, exist_ok=True)
    (at / "openapi.json").write_bytes(httpx.get(f"{url}/openapi.json").content)
    shutil.copy(HERE / ("node" if client.node else "python") / client.script, at)
    environ = os.environ | {"URL": url, "PATH": f"{at / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""}
    steps = [*((client.before,) if client.before else ()), *(_node(client) if client.node else _python(client))]
    try:
        version = (_npm if client.node else _pip)(client, at)
        for step in steps:
            _run(step, at, environ)
    except subprocess.CalledProcessError as error:
        return "", (error.stdout + error.stderr).decode(errors="replace")[-2000:]
    return client.version or version, ""


def _node(client: Client) -> tuple[tuple[str, ...], ...]:
    return (*TSC, client.script), ("npx", "tsx", client.script)


def _python(client: Client) -> tuple[tuple[str, ...], ...]:
    return (("bin/python", client.script),)


def _npm(client: Client, at: Path) -> str:
    (at / "package.json").write_text('{"type": "module", "private": true}')
    _run(("npm", "install", "--no-audit", "--no-fund", *TYPESCRIPT, *client.needs), at, os.environ)
    return str(json.loads((at / "node_modules" / client.package / "package.json").read_text())["version"])


def _pip(client: Client, at: Path) -> str:
    venv.create(at, with_pip=True)
    _run(("bin/pip", "install", "-q", *client.needs, "httpx"), at, os.environ | {"PYTHONPATH": ""})
    asked = f"import importlib.metadata; print(importlib.metadata.version({client.package!r}))"
    return _run(("bin/python", "-c", asked), at, os.environ | {"PYTHONPATH": ""}).strip()


def _run(step: tuple[str, ...], at: Path, environ: "os._Environ[str] | dict[str, str]") -> str:
    program, *rest = step
    words = (str(at / program) if program.startswith("bin/") else program, *rest)
    done = subprocess.run(words, cwd=at, env=dict(environ), capture_output=True, check=True, timeout=600)
    return done.stdout.decode()


if __name__ == "__main__":
    sys.exit(main())
