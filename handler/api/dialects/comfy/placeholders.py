"""Places in an app's template that were to be filled in before anybody draws it."""

import re
from typing import Final

PLACE: Final = re.compile(
    rb"\{\{[\w.\- ]{1,60}\}\}|\$\{[\w.\- ]{1,60}\}|%[A-Za-z_]\w{1,60}%|<[A-Za-z_]\w{1,60}>"
    rb"|\b\w{0,40}PLACEHOLDER\w{0,40}"
)
MOST: Final = 5


def placeholders(data: bytes) -> str:
    """How to say that a text has some; empty where it has none."""
    found = dict.fromkeys(one.group().decode() for one in PLACE.finditer(data[: 1 << 20]))
    if not found:
        return ""
    names = ", ".join([f"'{one}'" for one in found][:MOST])
    more = " and others" if len(found) > MOST else ""
    return f"; {names}{more} are placeholders of an app's template: fill them in first"
