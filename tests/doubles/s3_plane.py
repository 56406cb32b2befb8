"""Object stores on loopback: moto's S3 server in a process of its own, and one that does nothing it is asked to."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import httpx

BUCKET = "pictures"
# moto's server checks keys against its IAM; these are of nobody there, which matters only to `S3.strict`.
KEY, SECRET = "AKIACANARYCANARY", "canary/secret+that=stays/hidden"
SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
POLICY = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


@dataclass(frozen=True)
class S3:
    """A running S3 server with an empty `BUCKET`."""

    url: str

    def client(self, service: str = "s3") -> Any:
        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "owner", "region_name": "us-east-1"}
        return boto3.session.Session(**keys).client(service, endpoint_url=self.url)

    def objects(self) -> list[str]:
        """The keys of all objects."""
        return [found["Key"] for found in self.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def member(self, name: str = "member") -> tuple[str, str]:
        """A key and secret of somebody who may do all with S3."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=POLICY)
        made = iam.create_access_key(UserName=name)["AccessKey"]
        return made["AccessKeyId"], made["SecretAccessKey"]

    @contextmanager
    def strict(self) -> Iterator[None]:
        """From now on keys and signatures are checked. moto cannot check those of presigned URLs."""
        httpx.post(f"{self.url}/moto-api/reset-auth", content="0").raise_for_status()
        try:
            yield
        finally:
            httpx.post(f"{self.url}/moto-api/reset-auth", content="inf").raise_for_status()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start moto's server, and end it afterwards."""
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout
        s3 = S3(f"http://127.0.0.1:{int(process.stdout.readline())}")
        s3.client().create_bucket(Bucket=BUCKET)
        yield s3  # leaving closes its stdin, which ends it


class Broken:
    """A server that answers everything with `status`, or not at all if that is 0. Use as a context."""

    def __init__(self, status: int) -> None:
        self.tries = 0
        self.status, self._closing = status, threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Routes", (_Routes,), {"plane": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "Broken":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, routes: "_Routes") -> None:
        """One request; the answer repeats what it was sent, as some servers do."""
        self.tries += 1
        if not self.status:
            self._closing.wait()
            return
        body = f"<Error><Code>Canary{KEY}</Code><Message>{routes.headers}</Message></Error>".encode()
        routes.send_response(self.status)
        routes.send_header("content-length", str(len(body)))
        routes.end_headers()
        routes.wfile.write(body)


class _Routes(BaseHTTPRequestHandler):
    plane: Broken

    def do_PUT(self) -> None:
        self.plane.answer(self)

    do_HEAD = do_PUT

    def log_message(self, *_: object) -> None:
        pass
