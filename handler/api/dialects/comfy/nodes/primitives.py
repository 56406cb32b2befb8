"""Numbers and texts, what is computed of them, and switches, which are followed on the side that they choose."""

from collections.abc import Mapping
from typing import Any

from handler.api.dialects.comfy.arithmetic import compute
from handler.api.dialects.comfy.node import (
    ANY,
    CLIP,
    FLAG,
    IMAGE,
    LONGEST,
    MODEL,
    SEED,
    YES,
    At,
    Node,
    choice,
    lazily,
    maybe,
    number,
    rows,
    text,
    whole,
)

FAR = 2**63 - 1  # ComfyUI's largest number


def value(at: At, value: Any, **_: Any) -> Any:
    """Itself."""
    return value


def passed(at: At, any_input: Any, image_pass: Any, model_pass: Any, rest: Mapping[str, Any]) -> tuple[Any, ...]:
    """KJNodes' VRAM_Debug: what is linked to it, and how much memory is free, which is not told."""
    return any_input, image_pass, model_pass, 0, 0


def said(at: At, text: str) -> str:
    """WAS's Text Multiline, of which lines that begin with # are remarks."""
    return "\n".join(line for line in text.split("\n") if not line.strip().startswith("#"))


def texts(at: At, text: str, text_b: str, text_c: str, text_d: str) -> tuple[str, ...]:
    """Up to four."""
    return text, text_b, text_c, text_d


def short(at: At, text: str) -> str:
    """A text that is not too long."""
    if len(text) > LONGEST:
        at.refuse(f"it makes a text of more than {LONGEST} characters.")
    return text


def concatenate(at: At, string_a: str, string_b: str, delimiter: str) -> str:
    """One after the other."""
    return short(at, f"{string_a}{delimiter}{string_b}")


def joined(at: At, delimiter: str, clean_whitespace: str, rest: Mapping[str, Any]) -> str:
    """All texts that there are; WAS's leaves out those that are empty."""
    found = [str(one) for name, one in sorted(rest.items()) if name.startswith("text") and one is not None]
    clean = [one.strip() if clean_whitespace == "true" else one for one in found]
    return short(at, delimiter.replace("\\n", "\n").join(one for one in clean if one))


def replaced(at: At, string: str, find: str, replace: str) -> str:
    """Every place."""
    if find and string.count(find) * len(replace) + len(string) > LONGEST:
        at.refuse(f"it makes a text of more than {LONGEST} characters.")
    return string.replace(find, replace)


def trimmed(at: At, string: str, mode: str) -> str:
    """Without white space at its ends."""
    return {"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}[mode](string)


def cased(at: At, string: str, mode: str) -> str:
    """In other letters."""
    kinds = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
    return short(at, kinds[mode](string))


def part(at: At, string: str, start: int, end: int) -> str:
    """Some of it."""
    return string[start:end]


def length(at: At, string: str) -> int:
    """How many characters."""
    return len(string)


def holds(at: At, string: str, substring: str, case_sensitive: bool) -> bool:
    """Whether one has the other."""
    return substring in string if case_sensitive else substring.lower() in string.lower()


def generated(at: At, prompt: str, **_: Any) -> str:
    """No language model is here: the prompt passes."""
    at.note("no language model rewrites the prompt here; the prompt that it was given is used as it is.")
    return prompt


def neither(**_: Any) -> tuple[str, ...]:
    """What a language model would need is not looked at."""
    return ()


def math(at: At, value: str, a: Any, b: Any, c: Any) -> tuple[int, float]:
    """An expression of three numbers, as a whole number and as it is."""
    given = {"a": a, "b": b, "c": c}
    try:
        found = compute(
            value, {name: float(one) if isinstance(one, float) else int(one or 0) for name, one in given.items()}
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        at.refuse(f"'{value:.80}' cannot be computed: {error}.", "value")
    return round(found), float(found)


def chosen(switch: bool, **_: Any) -> tuple[str, ...]:
    """One side."""
    return ("on_true",) if switch else ("on_false",)


def switched(at: At, switch: bool, on_false: Any = None, on_true: Any = None) -> Any:
    """What the chosen side has."""
    found = on_true if switch else on_false
    if found is None:
        at.refuse(f"the side that is chosen, {chosen(switch)[0]}, has nothing.", chosen(switch)[0])
    return found


def first(at: At, rest: Mapping[str, Any]) -> Any:
    """The first that is there."""
    found = next((one for one in rest.values() if one is not None), None)
    if found is None:
        at.refuse("nothing leads to it.")
    return found


def seeded(at: At, seed: int) -> int:
    """Below 0 a page would choose one."""
    if seed < 0:
        import secrets

        at.note("a seed below 0 is drawn at random.")
        return secrets.randbelow(2**31)
    return seed


LONG, SHORT = text(), text(multiline=False)
STRINGS = "utils/string"
JOIN = {"string_a": LONG, "string_b": LONG, "delimiter": SHORT}
GENERATE = {
    "clip": lazily(CLIP),
    "prompt": LONG,
    "image": maybe(lazily(IMAGE)),
    "max_length": maybe(whole(256, 1, 32768)),
}
NUMBERS = {"value": SHORT, "a": maybe(ANY), "b": maybe(ANY), "c": maybe(ANY)}
SWITCH = {"switch": FLAG, "on_false": maybe(lazily(ANY)), "on_true": maybe(lazily(ANY))}
TEXT, WHOLE = ("STRING",), ("INT",)
TABLE = rows(
    Node("PrimitiveInt", "utils/primitive", value, WHOLE, {"value": whole(0, -FAR, FAR)}),
    Node("PrimitiveFloat", "utils/primitive", value, ("FLOAT",), {"value": number(0.0, -FAR, FAR)}),
    Node("PrimitiveString", "utils/primitive", value, TEXT, {"value": SHORT}),
    Node("PrimitiveStringMultiline", "utils/primitive", value, TEXT, {"value": LONG}),
    Node("PrimitiveBoolean", "utils/primitive", value, ("BOOLEAN",), {"value": FLAG}),
    Node("StringConcatenate", STRINGS, concatenate, TEXT, JOIN),
    Node("StringReplace", STRINGS, replaced, TEXT, {"string": LONG, "find": LONG, "replace": LONG}),
    Node("StringTrim", STRINGS, trimmed, TEXT, {"string": LONG, "mode": choice("Both", "Left", "Right")}),
    Node("StringSubstring", STRINGS, part, TEXT, {"string": LONG, "start": whole(0), "end": whole(0)}),
    Node("StringLength", STRINGS, length, WHOLE, {"string": LONG}),
    Node("StringContains", STRINGS, holds, ("BOOLEAN",), {"string": LONG, "substring": LONG, "case_sensitive": YES}),
    Node(
        "CaseConverter",
        STRINGS,
        cased,
        TEXT,
        {"string": LONG, "mode": choice("UPPERCASE", "lowercase", "Capitalize", "Title Case")},
    ),
    Node("TextGenerate", "text", generated, TEXT, GENERATE, chooses=neither, names=("generated_text",)),
    Node("ComfySwitchNode", "utils/logic", switched, ("*",), SWITCH, chooses=chosen),
    Node("Seed (rgthree)", "rgthree", seeded, WHOLE, {"seed": whole(0, -3, SEED.high)}),
    Node("SimpleMath+", "essentials", math, ("INT", "FLOAT"), NUMBERS),
    Node(
        "Text Concatenate",
        "WAS",
        joined,
        TEXT,
        {"delimiter": SHORT, "clean_whitespace": choice("true", "false")},
        rest="rest",
    ),
    Node("Text Multiline", "WAS", said, TEXT, {"text": LONG}),
    Node(
        "Text String",
        "WAS",
        texts,
        TEXT * 4,
        {"text": SHORT, "text_b": maybe(SHORT), "text_c": maybe(SHORT), "text_d": maybe(SHORT)},
    ),
    Node(
        "VRAM_Debug",
        "KJNodes",
        passed,
        ("*", "IMAGE", "MODEL", "INT", "INT"),
        {"any_input": maybe(ANY), "image_pass": maybe(IMAGE), "model_pass": maybe(MODEL)},
        rest="rest",
    ),
    Node("Any Switch (rgthree)", "rgthree", first, ("*",), {}, rest="rest"),
)
