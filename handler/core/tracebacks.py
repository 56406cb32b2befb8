"""What a log may say of an error that came while somebody's prompt was in work: its type, its way, and no text of its.

Libraries quote what they were given, whole, in parts, escaped or as numbers, so no search for the prompt's words finds
all of it. Of a message only those of our own phrases are told that it has in it.
"""

import traceback

SIGNS = (  # what operators look for, of GPUs and memory
    *("CUDA error", "CUDA driver error", "Triton Error", "CUBLAS_STATUS", "CUDNN_STATUS", "NVML", "ECC"),
    *("out of memory", "can't allocate memory", "illegal memory access", "unspecified launch failure", "shapes"),
    *("device-side assert", "misaligned address", "no kernel image", "launch timed out", "expected scalar type"),
)
UNSAID = "(the message is not told: it may quote a prompt)"


def outline(error: BaseException) -> str:
    """The traceback of `error`, after those of what it came from."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link and link not in chain:  # an error may be raised from itself
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "".join(map(_told, chain))


def _told(error: BaseException) -> str:
    message = str(error).lower()
    signs = ", ".join(sign for sign in SIGNS if sign.lower() in message)
    said = f"{signs} {UNSAID}" if signs else UNSAID
    return f"{''.join(traceback.format_tb(error.__traceback__))}{type(error).__name__}: {said}\n"


def causes(error: BaseException | None) -> list[BaseException]:
    """`error` and what it came from, which may be itself."""
    found: list[BaseException] = []
    while error and not any(error is each for each in found):
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def empty(error: BaseException) -> None:
    """Forget what is in the frames by which `error` and its causes came: tensors, pictures, itself. The way stays."""
    for each in causes(error):
        traceback.clear_frames(each.__traceback__)


def let_go(error: BaseException) -> None:
    """Forget the way that `error` and its causes came, with all that is in those frames."""
    empty(error)
    for each in causes(error):
        each.__traceback__ = None
