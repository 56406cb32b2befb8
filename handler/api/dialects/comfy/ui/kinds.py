"""Classes that are the page's own: no server has them, and API format never does."""

from typing import Final

PRIMITIVE: Final = "PrimitiveNode"
REROUTES: Final = ("Reroute", "Reroute (rgthree)")
SETTERS: Final = ("SetNode", "easy setNode")
GETTERS: Final = ("GetNode", "easy getNode")
EVERYWHERE: Final = (  # of cg-use-everywhere: they link to what is not linked, while the page runs
    "Anything Everywhere",
    "Anything Everywhere3",
    "Anything Everywhere?",
    "Prompts Everywhere",
)
SHOWN: Final = (
    *("Note", "MarkdownNote", "Label (rgthree)", "Bookmark (rgthree)", "Note Plus (mtb)", "WorkflowImage"),
    *("Fast Muter (rgthree)", "Fast Bypasser (rgthree)", "Fast Actions Button (rgthree)", "Random Unmuter (rgthree)"),
    *("Fast Groups Muter (rgthree)", "Fast Groups Bypasser (rgthree)", "Node Collector (rgthree)"),
    *("Mute / Bypass Repeater (rgthree)", "Mute / Bypass Relay (rgthree)", "Node Combiner (rgthree)"),
)
PAGES: Final = frozenset((PRIMITIVE, *REROUTES, *SETTERS, *GETTERS, *EVERYWHERE, *SHOWN))
