"""Modal's control plane on loopback: takes what the unmodified `modal deploy` or `modal run` uploads, and feeds its
container runtime.

It speaks a private protocol, that of modal 1.6.4, which pyproject.toml pins; with another version, read this again.
A container here is Modal's own entrypoint in a folder that holds what was uploaded, under the plane's environment.
"""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal._serialization import deserialize_data_format, serialize, serialize_data_format
from modal_proto import api_grpc
from modal_proto import api_pb2 as pb

ROOT = Path(__file__).parents[2]
DEADLINE_S = 180.0
BUILDER = "2025.06"
FROM_CONTAINERS = ("FunctionPutOutputs", "FunctionCallPutDataOut", "TaskResult", "VolumeCommit")
BUILT = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
FIXED: dict[str, Message] = {
    "AppClientDisconnect": Empty(),
    "AppCreate": pb.AppCreateResponse(app_id="ap-1", app_page_url="http://127.0.0.1/"),
    "AppGetByDeploymentName": pb.AppGetByDeploymentNameResponse(environment_name="main"),
    "AppGetLayout": pb.AppGetLayoutResponse(),
    "AppHeartbeat": Empty(),
    "AppPublish": pb.AppPublishResponse(url="http://127.0.0.1/"),
    "ClassCreate": pb.ClassCreateResponse(class_id="cs-1"),
    "ClientHello": pb.ClientHelloResponse(),
    "ContainerHeartbeat": pb.ContainerHeartbeatResponse(),
    "ContainerHello": Empty(),
    "EnvironmentGetOrCreate": pb.EnvironmentGetOrCreateResponse(
        environment_id="en-1",
        metadata=pb.EnvironmentMetadata(name="main", settings=pb.EnvironmentSettings(image_builder_version=BUILDER)),
    ),
    "FunctionCallPutDataOut": Empty(),
    "FunctionGetDynamicConcurrency": pb.FunctionGetDynamicConcurrencyResponse(concurrency=1),
    "FunctionPutOutputs": Empty(),
    "ImageJoinStreaming": pb.ImageJoinStreamingResponse(result=BUILT, metadata=pb.ImageMetadata()),
    "MountBatchedCheckExistence": pb.MountBatchedCheckExistenceResponse(),
    "MountPutFile": pb.MountPutFileResponse(exists=True),
    "TaskResult": Empty(),
    "VolumeCommit": pb.VolumeCommitResponse(skip_reload=True),
}


@dataclass(frozen=True)
class Input:
    """What a container is asked: a method or function with its argument, or, with `body`, the app with a scope.

    `given` is what `modal run` asked for, passed on as it came.
    """

    argument: Any = None
    method: str = ""
    body: bytes | None = None
    given: pb.FunctionInput | None = None

    def message(self, number: int) -> pb.FunctionGetInputsItem:
        """As Modal sends it; an HTTP request's body is asked for afterwards."""
        given = self.given or pb.FunctionInput(
            args=serialize((() if self.argument is None else (self.argument,), {})),
            data_format=pb.DATA_FORMAT_PICKLE,
            method_name=self.method,
        )
        return pb.FunctionGetInputsItem(input_id=f"in-{number}", function_call_id=f"fc-{number}", input=given)


def http(method: str, path: str, body: bytes = b"", **headers: str) -> Input:
    """A request to the app that the class's method `web` returns."""
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": sent}
    return Input({**scope, "client": ("127.0.0.1", 1)}, "web", body)


@dataclass(frozen=True)
class Ended:
    """How a container ended. `values`: what each input was answered, HTTP requests with status and body."""

    code: int
    log: str
    values: list[Any]
    failures: list[str]  # of the container itself, as it reported them
    commits: int


class Plane:
    """Use as a context: `with Plane(folder) as plane`, `plane.deploy(...)`, look, then `plane.contain(...)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.objects: dict[str, Any] = {}  # what each id that was given out stands for
        self._inputs: list[Input] = []
        self._given_out = 0
        self._contained: Mapping[str, str] = {}
        self._called = asyncio.Event()  # then there is `_answering`
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Plane":
        self._thread.start()
        self._server, self.url = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def deploy(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """`modal deploy platform/modal_app.py`, from the repository's root, by a user with a token."""
        return self._modal("deploy", "platform/modal_app.py", environment=environment)

    def run(self, name: str, *options: str, contained: Mapping[str, str], **environment: str) -> Any:
        """`modal run platform/modal_app.py::NAME`; a container with `contained` in its environment answers it."""
        self._contained = contained
        self._called.clear()
        return self._modal("run", f"platform/modal_app.py::{name}", *options, environment=environment)

    def _modal(self, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        token = {"MODAL_TOKEN_ID": "ak-unused", "MODAL_TOKEN_SECRET": "as-unused"}
        modal = str(Path(sys.executable).with_name("modal"))
        return self._run([modal, *arguments], ROOT, {**token, **environment})

    def function(self, name: str) -> pb.Function:
        """What was uploaded as `name`; for each of several GPUs the same but for the GPU."""
        return self._data(name)[1].ranked_functions[0].function

    def gpus(self, name: str) -> list[str]:
        """The GPUs `name` may run on, in order of preference."""
        ranked = sorted(self._data(name)[1].ranked_functions, key=lambda one: one.rank)
        return [one.function.resources.gpu_config.gpu_type for one in ranked]

    def environment(self, function: pb.Function) -> dict[str, str]:
        """What the secrets of `function` put in its environment; a later one wins."""
        given: dict[str, str] = {}
        for secret in function.secret_ids:
            given |= dict(self.objects[secret].env_dict)
        return given

    def image(self, function: pb.Function) -> list[str]:
        """The commands that build the image of `function`, from its first layer."""
        return [line for layer in self._layers(function.image_id) for line in layer.dockerfile_commands]

    def _layers(self, image: str) -> list[pb.Image]:
        made = self.objects[image].image
        return [*(layer for base in made.base_images for layer in self._layers(base.image_id)), made]

    def mounted(self, function: pb.Function) -> dict[str, pb.MountFile]:
        """The local files that `function` sees, by their path in its container."""
        copied = [layer.context_mount_id for layer in self._layers(function.image_id) if layer.context_mount_id]
        mounts = [self.objects[mount] for mount in (*copied, *function.mount_ids)]
        return {file.filename: file for mount in mounts for file in mount.files}

    def contain(self, name: str, inputs: Sequence[Input] = (), **environment: str) -> Ended:
        """Modal's entrypoint with `name` as deployed, given `inputs` one after another and then told to leave."""
        function, home = self.function(name), self.folder / "container"
        home.mkdir(exist_ok=True)
        (home / "arguments").write_bytes(self._arguments(name).SerializeToString())
        (home / "restored").unlink(missing_ok=True)
        runtime = {
            "KINDLING_DEVICE": "cpu",  # whatever was rented
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(home / "arguments"),
            "MODAL_ENABLE_SNAP_RESTORE": "1",
            "MODAL_RESTORE_STATE_PATH": str(home / "restored"),
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": "ta-1",
            "PYTHONPATH": str(self._lay_out(function)),
        }
        self._inputs, self._given_out = list(inputs), 0
        for kind in FROM_CONTAINERS:
            self.calls[kind].clear()
        command = [sys.executable, "-m", "modal._container_entrypoint"]
        ended = self._run(command, home, {**self.environment(function), **runtime, **environment})
        return Ended(
            ended.returncode,
            ended.stdout,
            [self._value(f"fc-{number}", one) for number, one in enumerate(inputs[: self._given_out])],
            [result.result.exception for result in self.calls["TaskResult"]],
            len(self.calls["VolumeCommit"]),
        )

    def _value(self, call: str, asked: Input) -> Any:
        outputs = [output for put in self.calls["FunctionPutOutputs"] for output in put.outputs]
        output = next(one for one in outputs if one.input_id == call.replace("fc", "in"))
        if output.result.exception or asked.body is None:
            return output.result.exception or deserialize_data_format(output.result.data, output.data_format, None)
        told = [put for put in self.calls["FunctionCallPutDataOut"] if put.function_call_id == call]
        messages = [_plain(chunk) for put in told for chunk in put.data_chunks]
        return messages[0]["status"], b"".join(message["body"] for message in messages[1:])

    def _run(self, command: list[str], folder: Path, extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KINDLING_", "MODAL_", "HF_"))}
        here = {"MODAL_SERVER_URL": self.url, "MODAL_CONFIG_PATH": str(self.folder / "none"), "OMP_NUM_THREADS": "1"}
        environment = {**kept, **here, "HOME": str(self.folder), **extra}
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )

    def _lay_out(self, function: pb.Function) -> Path:
        """Copy what was uploaded, and nothing else, to where this container shall find it: its /root."""
        shutil.rmtree(self.folder / "root", ignore_errors=True)
        for target, file in self.mounted(function).items():
            place = self.folder / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            source = ROOT / ("platform" if place.parent.name == "root" else "") / Path(target).relative_to("/root")
            place.write_bytes(source.read_bytes())
            assert hashlib.sha256(place.read_bytes()).hexdigest() == file.sha256_hex
        return self.folder / "root"

    def _data(self, name: str) -> tuple[str, pb.FunctionData]:
        """The id and the latest definition of `name`."""
        made = [(i, data) for i, data in self.objects.items() if isinstance(data, pb.FunctionData)]
        return next((i, data) for i, data in reversed(made) if data.function_name == name)

    def _arguments(self, name: str) -> pb.ContainerArguments:
        function_id, data = self._data(name)
        function = pb.Function()
        function.CopyFrom(data.ranked_functions[0].function)
        function.is_checkpointing_function = function.checkpointing_enabled
        function.resources.ClearField("gpu_config")
        layout = pb.AppLayout(function_ids={name: function_id})
        layout.objects.add(object_id=function_id, function_handle_metadata=_metadata(data))
        if function.is_class:
            layout.class_ids[name.removesuffix(".*")] = "cs-1"
            layout.objects.add(object_id="cs-1", class_handle_metadata=pb.ClassHandleMetadata())
        for needed in function.object_dependencies:
            made = layout.objects.add(object_id=needed.object_id)
            if isinstance(volume := self.objects[needed.object_id], pb.VolumeGetOrCreateRequest):
                made.volume_metadata.name = volume.deployment_name
        return pb.ContainerArguments(
            task_id="ta-1",
            function_id=function_id,
            app_id="ap-1",
            function_def=function,
            app_layout=layout,
            environment_name="main",
            checkpoint_id="ch-1",
        )

    def body(self, call: str) -> bytes | None:
        """What an HTTP request brings beside its scope."""
        return self._inputs[int(call.removeprefix("fc-"))].body

    async def _listen(self) -> tuple[grpclib.server.Server, str]:
        server = grpclib.server.Server([_Routes(self)])
        await server.start("127.0.0.1", 0)
        assert server._server
        return server, f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    # What follows is called by name, one for each request whose answer depends on it.

    def ContainerCheckpoint(self, request: Any) -> Message:
        """Modal's runtime would now stop the process and continue copies of it; here it goes on as its own copy."""
        (self.folder / "container" / "restored").write_text('{"task_id": "ta-2"}')
        return Empty()

    def FunctionMap(self, request: Any) -> Message:
        name = self.objects[request.function_id].function_name
        contain = partial(self.contain, name, [Input(given=request.pipelined_inputs[0].input)], **self._contained)
        self._answering = self._loop.run_in_executor(None, contain)
        self._called.set()
        taken = pb.FunctionPutInputsResponseItem(input_id="in-0", input_jwt="unused")
        return pb.FunctionMapResponse(function_call_id="fc-0", pipelined_inputs=[taken])

    async def answered(self) -> Ended:
        """How the container ended that answers `modal run`."""
        await self._called.wait()
        return await asyncio.shield(self._answering)

    def FunctionPrecreate(self, request: Any) -> Message:
        return pb.FunctionPrecreateResponse(function_id=self._given("fu", None), handle_metadata=_metadata(request))

    def FunctionCreate(self, request: Any) -> Message:
        data = pb.FunctionData()
        data.CopyFrom(request.function_data)
        if not data.ranked_functions:  # with at most one GPU
            for name in ("module_name", "function_name", "function_type"):
                setattr(data, name, getattr(request.function, name))
            data.ranked_functions.add(rank=0).function.CopyFrom(request.function)
        self.objects[request.existing_function_id] = data
        return pb.FunctionCreateResponse(
            function_id=request.existing_function_id,
            function=data.ranked_functions[0].function,
            function_data=data,
            handle_metadata=_metadata(data),
        )

    def FunctionGetInputs(self, request: Any) -> Message:
        number, self._given_out = self._given_out, self._given_out + 1
        leave = pb.FunctionGetInputsItem(kill_switch=True)
        return pb.FunctionGetInputsResponse(
            inputs=[self._inputs[number].message(number) if number < len(self._inputs) else leave]
        )

    def ImageGetOrCreate(self, request: Any) -> Message:
        built = pb.ImageMetadata(image_builder_version=request.builder_version)
        return pb.ImageGetOrCreateResponse(image_id=self._given("im", request), result=BUILT, metadata=built)

    def MountGetOrCreate(self, request: Any) -> Message:
        metadata = pb.MountHandleMetadata(content_checksum_sha256_hex="00")
        return pb.MountGetOrCreateResponse(mount_id=self._given("mo", request), handle_metadata=metadata)

    def SecretGetOrCreate(self, request: Any) -> Message:
        return pb.SecretGetOrCreateResponse(secret_id=self._given("st", request))

    def VolumeGetOrCreate(self, request: Any) -> Message:
        metadata = pb.VolumeMetadata(name=request.deployment_name, version=request.version)
        return pb.VolumeGetOrCreateResponse(volume_id=self._given("vo", request), metadata=metadata)

    def _given(self, kind: str, request: Any) -> str:
        """A new id for what `request` asks for."""
        name = f"{kind}-{len(self.objects)}"
        self.objects[name] = request
        return name


def _route(name: str) -> Any:
    async def answer(self: Any, stream: Any) -> None:
        request = await stream.recv_message()
        self.plane.calls[name].append(request)
        reply = FIXED.get(name) or getattr(self.plane, name, lambda request: None)(request)
        if reply is None:
            raise GRPCError(Status.UNIMPLEMENTED, f"tests/doubles/modal_plane.py does not know {name}")
        await stream.send_message(reply)

    return answer


ROUTES = {name: _route(name) for name in api_grpc.ModalClientBase.__abstractmethods__}


class _Routes(type("Answers", (api_grpc.ModalClientBase,), ROUTES)):  # type: ignore[misc]
    def __init__(self, plane: Plane) -> None:
        self.plane = plane

    async def FunctionCallGetDataIn(self, stream: Any) -> None:
        """An HTTP request's body in one piece; then the client stays connected until it is answered."""
        request = await stream.recv_message()
        body = self.plane.body(request.function_call_id)
        message = serialize_data_format({"type": "http.request", "body": body}, pb.DATA_FORMAT_ASGI)
        await stream.send_message(pb.DataChunk(data_format=pb.DATA_FORMAT_ASGI, data=message, index=1))
        await asyncio.Event().wait()

    async def FunctionGetOutputs(self, stream: Any) -> None:
        """What the container answered, once it has."""
        await stream.recv_message()
        await self.plane.answered()
        [put] = self.plane.calls["FunctionPutOutputs"]
        [output] = put.outputs
        item = pb.FunctionGetOutputsItem(result=output.result, data_format=output.data_format, input_id="in-0")
        await stream.send_message(pb.FunctionGetOutputsResponse(idxs=[0], outputs=[item], last_entry_id="1-0"))

    async def AppGetLogs(self, stream: Any) -> None:
        """What the container said, all at once."""
        await stream.recv_message()
        said = pb.TaskLogs(data=(await self.plane.answered()).log, file_descriptor=pb.FILE_DESCRIPTOR_STDOUT)
        await stream.send_message(pb.TaskLogsBatch(task_id="ta-1", entry_id="1-0", items=[said]))
        await stream.send_message(pb.TaskLogsBatch(app_done=True))


def _metadata(made: Any) -> pb.FunctionHandleMetadata:
    """What Modal tells about a function, or about a class and its methods."""
    methods = {
        name: pb.FunctionHandleMetadata(
            function_name=method.function_name,
            function_type=method.function_type,
            web_url=f"http://127.0.0.1/{name}" if method.webhook_config.type else "",
            is_method=True,
            use_method_name=name,
            function_schema=method.function_schema,
            app_id="ap-1",
        )
        for name, method in made.method_definitions.items()
    }
    return pb.FunctionHandleMetadata(
        function_name=made.function_name,
        function_type=made.function_type,
        definition_id="de-1",
        app_id="ap-1",
        method_handle_metadata=methods,
    )


def _plain(told: Any) -> Any:
    return deserialize_data_format(told.data, told.data_format, None)
