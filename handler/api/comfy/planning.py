"""What a prompt asks for, known before anything is drawn; what drawing would refuse is refused here already."""

from collections.abc import Mapping
from typing import Any

from handler.api.comfy.naming import filled
from handler.api.comfy.passes import steps
from handler.api.comfy.refusals import refused
from handler.api.dialects.comfy.plan import Load, Plan, Served
from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidType, RequestError
from handler.core.stepcache import StepCacheSetting

FAILED = "prompt_outputs_failed_validation"


def planned(
    payload: Mapping[str, Any], served: Served, load: Load, spec: ModelSpec, step_cache: StepCacheSetting
) -> Plan:
    """The plan of a payload's `prompt`, of its `partial_execution_targets` alone if it has any. Raises what refuses it.

    For a thread: a graph may be large, and its images take time.
    """
    from handler.api.dialects.comfy.graph import read  # late: most workers never see one

    plan = read(graph := payload["prompt"], served, load)
    if targets := payload.get("partial_execution_targets"):
        if not isinstance(targets, list):
            raise InvalidType("partial_execution_targets should be a list of ids.", "partial_execution_targets")
        plan = Plan(tuple(one for one in plan.outputs if one.node in targets), plan.node_errors, plan.notes)
    if not plan.outputs:
        raise refused("prompt_no_outputs", "Prompt has no outputs", "No output node is among the targets.")
    require_drawable(plan, graph, spec, step_cache)
    return plan


def require_drawable(plan: Plan, graph: Mapping[str, Any], spec: ModelSpec, step_cache: StepCacheSetting) -> None:
    """GraphRefused if an output would be kept outside its folder, or asks for what `spec` cannot do."""
    for output in plan.outputs:
        try:
            filled(output.prefix, graph, (0, 0))
            for step in steps(output):
                spec.validate(step.request, step_cache)
        except RequestError as error:
            raise refused(FAILED, f"Node {output.node} cannot be drawn", error.message) from None
