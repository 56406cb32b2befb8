"""Every way Kindling says no.

KindlingError
├── RequestError                    the caller can fix it; never retried
│   ├── InvalidJson            400  the body is not one JSON object
│   ├── UnknownParameter       400
│   ├── MissingParameter       400
│   ├── InvalidType            400
│   ├── InvalidValue           400  malformed, such as size "1024x"
│   ├── Unsupported            400  understood, but not offered here
│   ├── GraphRefused           400  a ComfyUI graph that cannot be drawn
│   ├── Unauthorized           401
│   ├── AdminsOnly             403  a good key, but not one of KINDLING_ADMIN_KEYS
│   ├── ForeignOrigin          403  a page of another site, or a name that leads to this machine
│   ├── OutsideFolder          403  a file's name that leads out of its folder
│   ├── ModelNotFound          404
│   ├── RouteNotFound          404
│   ├── FileMissing            404
│   ├── WorkflowMissing        404
│   ├── MethodNotAllowed       405
│   ├── BodyLate               408
│   ├── BodyTooLarge           413
│   ├── UnsupportedMedia       415  not JSON, or compressed
│   ├── OutOfRange             422  well-formed, but outside what this model allows
│   └── KeyReused              422  an idempotency key that came with another request before
├── QueueFull                  429  retryable
├── SpendCapReached            429  this month's money is spent; trying again does not help
├── Cancelled                  499  the caller went away or the job was stopped
├── NumericalError             500  NaN or an all-black picture
├── OutOfMemory                500  this size does not fit; the worker goes on
│   └── Exhausted                   once too often: fatal, this process must end
├── DeviceLost                 500  retryable elsewhere; fatal: this process must end
├── Internal                   500  a bug; its text stays in the log
│   └── Broken                      the same again and again: fatal, this process must end
├── FetchFailed                500  the hub, the network or the disk did not let a model come
├── NotReady                   503  retryable: starting or stopping
├── DeadlineExceeded           504  the picture was not ready in the time that its request had
└── StartError                 503  this worker cannot serve; retryable elsewhere, fatal here
    ├── SettingsError               a KINDLING_* variable is unknown or malformed
    ├── WeightsMissing              the model's files are not where they should be
    ├── WeightsCorrupt              a file is torn, foreign or changed; the message names it
    ├── VolumeFailed                the volume cannot be read or written
    ├── DeviceMissing               the device asked for is not there
    ├── DoesNotFit                  the model needs more memory than the device has
    └── BudgetExceeded              the cold start took longer than its budget
"""

import math
from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar, Self

from handler.core.quoting import QUOTED, brief, brief_all

RETRY_S, MAX_RETRY_S = 5.0, 120  # where nothing better is known; at most


class KindlingError(Exception):
    """Base of all errors with an answer for the caller. `param` names the offending field, `about` the file at fault.
    `retry_s` is when a retryable one is worth another try, in whole seconds, 1 to `MAX_RETRY_S`."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False
    fatal: ClassVar[bool] = False

    def __init__(self, message: str, param: str | None = None, retry_s: float = RETRY_S, about: str = "") -> None:
        super().__init__(message)
        self.message, self.param, self.about = message, param, about
        self.retry_s = min(max(math.ceil(retry_s), 1), MAX_RETRY_S)

    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def anew(self) -> Self:
        """The same for one more who is told it: who lets go of an error ends coroutines that wait in its `except`."""
        same = copy(self)  # until Python 3.13, for it clears the frames of all who caught it
        same.__cause__ = self.__cause__
        return same


class RequestError(KindlingError):
    """What a caller is told quotes what it sent; however long that is, little of it comes back."""

    status, kind, code = 400, "invalid_request_error", "invalid_request"

    def __init__(self, message: str, param: str | None = None, retry_s: float = RETRY_S) -> None:
        super().__init__(brief(message), param and brief(param, QUOTED), retry_s)


class InvalidJson(RequestError):
    code = "invalid_json"


class UnknownParameter(RequestError):
    code = "unknown_parameter"


class MissingParameter(RequestError):
    code = "missing_required_parameter"


class InvalidType(RequestError):
    code = "invalid_type"


class InvalidValue(RequestError):
    code = "invalid_value"


class Unsupported(RequestError):
    code = "unsupported_parameter"


class GraphRefused(RequestError):
    """A ComfyUI graph that cannot be drawn. `answer` is what its clients expect: `error` and `node_errors`."""

    code = "graph_refused"

    def __init__(self, message: str, answer: Mapping[str, Any]) -> None:
        super().__init__(message, "prompt")
        self.answer = {name: brief_all(value) for name, value in answer.items()}


class Unauthorized(RequestError):
    status, code = 401, "invalid_api_key"


class AdminsOnly(RequestError):
    status, code = 403, "admin_key_required"


class ForeignOrigin(RequestError):
    status, code = 403, "foreign_origin"


class OutsideFolder(RequestError):
    status, code = 403, "outside_folder"


class ModelNotFound(RequestError):
    status, code = 404, "model_not_found"


class RouteNotFound(RequestError):
    status, code = 404, "not_found"


class FileMissing(RequestError):
    status, code = 404, "file_not_found"


class WorkflowMissing(RequestError):
    status, code = 404, "workflow_not_found"


class MethodNotAllowed(RequestError):
    status, code = 405, "method_not_allowed"


class BodyLate(RequestError):
    status, code = 408, "request_timeout"


class BodyTooLarge(RequestError):
    status, code = 413, "body_too_large"


class UnsupportedMedia(RequestError):
    status, code = 415, "unsupported_media_type"


class OutOfRange(RequestError):
    status, code = 422, "out_of_range"


class KeyReused(RequestError):
    status, code = 422, "idempotency_key_reused"


class QueueFull(KindlingError):
    status, kind, code, retryable = 429, "rate_limit_error", "queue_full", True


class SpendCapReached(KindlingError):
    status, kind, code = 429, "insufficient_quota", "spend_cap_reached"


class Cancelled(KindlingError):
    status, code = 499, "cancelled"


class NumericalError(KindlingError):
    code = "numerical_error"


class OutOfMemory(KindlingError):
    code = "out_of_memory"


class Exhausted(OutOfMemory):
    fatal = True


class DeviceLost(KindlingError):
    code, retryable, fatal = "device_lost", True, True


class Internal(KindlingError):
    pass


class Broken(Internal):
    fatal = True


class FetchFailed(KindlingError):
    code = "fetch_failed"


class NotReady(KindlingError):
    status, code, retryable = 503, "not_ready", True


class DeadlineExceeded(KindlingError):
    status, code = 504, "deadline_exceeded"


class StartError(KindlingError):
    status, code, retryable, fatal = 503, "start_failed", True, True


class SettingsError(StartError):
    code = "invalid_setting"


class WeightsMissing(StartError):
    code = "weights_missing"


class WeightsCorrupt(StartError):
    code = "weights_corrupt"


class VolumeFailed(StartError):
    code = "volume_failed"


class DeviceMissing(StartError):
    code = "device_missing"


class DoesNotFit(StartError):
    code = "does_not_fit"


class BudgetExceeded(StartError):
    code = "cold_start_budget_exceeded"
