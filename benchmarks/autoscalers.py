"""When each platform starts another worker, as far as it says, with what we deploy there: for fleet.py."""

from dataclasses import dataclass

from simulation import Rule

IDLE_S = (5, 15, 30, 60, 120, 300, 600, 1200)


@dataclass(frozen=True, slots=True)
class Platform:
    """How it starts workers, with the numbers to try, ours first; and how to say to it what was found.

    Where requests wait in a worker they do so in its own queue: `inside` are those and what is drawn.
    """

    rule: Rule
    values: tuple[float, ...]
    inside: int
    words: str
    between_s: float = 0.0
    idle_s: tuple[float, ...] = IDLE_S


BY_SCALED_OBJECT = (
    "minReplicaCount: {least}, maxReplicaCount: {most}, cooldownPeriod: {idle:g} and targetValue: {value:g}"
)
PLATFORMS = {
    # Its SDK's worker takes the next job up to a second later: docs/deploy/runpod.md
    "runpod": Platform(Rule("delay", 4), (4,), 1, "--workers-min {least} --workers-max {most} --idle {idle:g}", 0.7),
    "modal": Platform(
        Rule("count", 4),
        (4, 1, 2),
        16,
        "MODAL_MIN={least} MODAL_MAX={most}, and scaledown_window={idle:g}, target_inputs={value:g} in the file",
    ),
    "fal": Platform(
        Rule("count", 4),
        (4,),
        4,
        "fal apps scale kindling --min-concurrency {least} --max-concurrency {most} --keep-alive {idle:g}",
    ),
    "kubernetes": Platform(Rule("count", 4, every_s=15), (4, 1, 2), 33, BY_SCALED_OBJECT),  # its autoscaler's interval
    # It wants instances 60 % full of their containerConcurrency of 4, and ends idle ones after 15 minutes.
    "cloudrun": Platform(
        Rule("count", 2.4, every_s=5), (2.4,), 4, 'minScale: "{least}" and maxScale: "{most}"', idle_s=(900,)
    ),
}
