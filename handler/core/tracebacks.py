"""What a log may say of an error that came while somebody's prompt was in work.

Libraries quote what they were given: a message is told only where it has no word of the prompt in it.
"""

import re
import traceback

WORD = re.compile(r"\w{4,}")
UNSAID = "(a message that may quote the prompt; ask again with x as the prompt to see it)"


def outline(error: BaseException, *prompts: str) -> str:
    """The traceback of `error`, after those of what it came from; without `prompts`, which nobody knew, no message."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link and link not in chain:  # an error may be raised from itself
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "".join(_told(each, prompts) for each in chain)


def _told(error: BaseException, prompts: tuple[str, ...]) -> str:
    message = str(error)
    said = message if prompts and not any(_quotes(message, prompt) for prompt in prompts) else UNSAID
    return f"{''.join(traceback.format_tb(error.__traceback__))}{type(error).__name__}: {said}\n"


def _quotes(message: str, prompt: str) -> bool:
    said, asked = (set(WORD.findall(text.casefold())) for text in (message, prompt))
    return not said.isdisjoint(asked) or (len(prompt) > 1 and prompt in message)


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
