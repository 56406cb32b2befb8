"""Every way of saying no: what each answers with and means, as clients and platforms know it, and as the text says."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from handler.core import errors
from handler.core.errors import MAX_RETRY_S, RETRY_S, KindlingError, RequestError

TABLE: dict[str, tuple[Any, ...]] = {  # status, type and code of the answer; worth another try; this process must end
    "KindlingError": (500, "server_error", "internal_error", False, False),
    "RequestError": (400, "invalid_request_error", "invalid_request", False, False),
    "InvalidJson": (400, "invalid_request_error", "invalid_json", False, False),
    "UnknownParameter": (400, "invalid_request_error", "unknown_parameter", False, False),
    "MissingParameter": (400, "invalid_request_error", "missing_required_parameter", False, False),
    "InvalidType": (400, "invalid_request_error", "invalid_type", False, False),
    "InvalidValue": (400, "invalid_request_error", "invalid_value", False, False),
    "Unsupported": (400, "invalid_request_error", "unsupported_parameter", False, False),
    "GraphRefused": (400, "invalid_request_error", "graph_refused", False, False),
    "OutsideFolder": (403, "invalid_request_error", "outside_folder", False, False),
    "FileMissing": (404, "invalid_request_error", "file_not_found", False, False),
    "WorkflowMissing": (404, "invalid_request_error", "workflow_not_found", False, False),
    "Unauthorized": (401, "invalid_request_error", "invalid_api_key", False, False),
    "AdminsOnly": (403, "invalid_request_error", "admin_key_required", False, False),
    "ForeignOrigin": (403, "invalid_request_error", "foreign_origin", False, False),
    "ModelNotFound": (404, "invalid_request_error", "model_not_found", False, False),
    "RouteNotFound": (404, "invalid_request_error", "not_found", False, False),
    "MethodNotAllowed": (405, "invalid_request_error", "method_not_allowed", False, False),
    "BodyLate": (408, "invalid_request_error", "request_timeout", False, False),
    "BodyTooLarge": (413, "invalid_request_error", "body_too_large", False, False),
    "UnsupportedMedia": (415, "invalid_request_error", "unsupported_media_type", False, False),
    "OutOfRange": (422, "invalid_request_error", "out_of_range", False, False),
    "KeyReused": (422, "invalid_request_error", "idempotency_key_reused", False, False),
    "QueueFull": (429, "rate_limit_error", "queue_full", True, False),
    "SpendCapReached": (429, "insufficient_quota", "spend_cap_reached", False, False),
    "Cancelled": (499, "server_error", "cancelled", False, False),
    "NumericalError": (500, "server_error", "numerical_error", False, False),
    "OutOfMemory": (500, "server_error", "out_of_memory", False, False),
    "Exhausted": (500, "server_error", "out_of_memory", False, True),
    "DeviceLost": (500, "server_error", "device_lost", True, True),
    "Internal": (500, "server_error", "internal_error", False, False),
    "Broken": (500, "server_error", "internal_error", False, True),
    "FetchFailed": (500, "server_error", "fetch_failed", False, False),
    "NotReady": (503, "server_error", "not_ready", True, False),
    "DeadlineExceeded": (504, "server_error", "deadline_exceeded", False, False),
    "StartError": (503, "server_error", "start_failed", True, True),
    "SettingsError": (503, "server_error", "invalid_setting", True, True),
    "WeightsMissing": (503, "server_error", "weights_missing", True, True),
    "WeightsCorrupt": (503, "server_error", "weights_corrupt", True, True),
    "VolumeFailed": (503, "server_error", "volume_failed", True, True),
    "DeviceMissing": (503, "server_error", "device_missing", True, True),
    "DoesNotFit": (503, "server_error", "does_not_fit", True, True),
    "BudgetExceeded": (503, "server_error", "cold_start_budget_exceeded", True, True),
}


def kinds(kind: type[KindlingError] = KindlingError) -> Iterator[type[KindlingError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


OURS = [kind for kind in kinds() if kind.__module__ == errors.__name__]


def test_each_answers_as_ever() -> None:
    found = {kind.__name__: (kind.status, kind.kind, kind.code, kind.retryable, kind.fatal) for kind in OURS}
    assert found == TABLE


def test_the_text_shows_the_tree() -> None:
    rows = re.findall(r"^([│ ]*)[├└]── (\w+) *(\d{3})?", errors.__doc__ or "", re.MULTILINE)
    assert [name for _, name, _ in rows] == [kind.__name__ for kind in OURS if kind is not KindlingError]
    for indent, name, status in rows:
        kind: type[KindlingError] = getattr(errors, name)
        assert (len(indent) // 4, name) == (len(kind.__mro__) - len(KindlingError.__mro__) - 1, name)
        assert status in ("", str(kind.status)), name


def test_an_error_says_what_is_wrong_and_where() -> None:
    error = RequestError("no", "size")
    assert (str(error), error.message, error.param, error.retry_s) == ("no", "no", "size", 5)
    told = {"message": "no", "type": "invalid_request_error", "param": "size", "code": "invalid_request"}
    assert json.loads(json.dumps(error.body())) == {"error": told}
    assert KindlingError("no").body()["error"]["param"] is None


@pytest.mark.parametrize(
    ("asked", "told"), [(-1, 1), (0, 1), (1, 1), (1.01, 2), (4.9, 5), (119.5, 120), (120, 120), (121, 120), (1e9, 120)]
)
def test_when_to_come_back(asked: float, told: int) -> None:
    assert KindlingError("no", retry_s=asked).retry_s == told
    assert (RETRY_S, MAX_RETRY_S) == (5.0, 120)
