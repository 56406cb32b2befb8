"""Say what a graph means, node by node, before it is drawn: its files, its pictures, memory and time, and how to ask.

Exit codes: 0 it can be drawn, at least in part, once the files that it names are there; 1 it is refused; 2 the file
cannot be read as a graph.
"""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from handler.api.comfy.explaining import explain
from handler.api.comfy.report import NodeTold, Report
from handler.cli.comfy import looking

WIDEST, NARROWEST = 120, 60
STATES = {"read": " ", "refused": "x", "waits": ".", "unused": "-"}
LEGEND = "x cannot be done   . waits for one that cannot   - no output needs it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action's options on `parser`."""
    looking.add_file(parser)
    looking.add_images(parser)
    parser.add_argument("--gpu", metavar="NAME", help="judge memory and time on this GPU (default: this machine)")


def run(options: argparse.Namespace) -> int:
    """Print the report; the exit code."""
    report = explain(looking.read(options), looking.ground(options))
    print(json.dumps(report.told()) if options.json else "\n".join(lines(report)))
    return 1 if report.verdict == "refused" else 0


def lines(report: Report) -> Iterator[str]:
    """The report for people."""
    yield from head(report)
    yield from _about(report)
    yield from _pictures(report)
    yield from _files(report)
    yield from _costs(report)
    yield "\nNODES"
    yield from (line for node in report.nodes for line in _node(node))
    if any(node.state != "read" for node in report.nodes):
        yield f"  ({LEGEND})"
    yield "\nCOMMANDS"
    yield from report.curl
    yield from (line for said in report.curl_notes for line in _wrapped("", said))


def head(report: Report) -> Iterator[str]:
    """The verdict, what it rests on, and what has to be done before."""
    model, runs = report.model, report.verdict != "refused"
    yield from _wrapped("VERDICT  ", f"{report.verdict}, with {' '.join(model.settings)}" if runs else "refused")
    yield from (line for why in report.why for line in _wrapped(" " * 9, why))
    for number, one in enumerate(report.missing if runs else (), 1):
        yield from _wrapped(f"{'BEFORE' if number == 1 else '':<8} {number}. ", f"{one[:1].upper()}{one[1:]}.")


def _about(report: Report) -> Iterator[str]:
    model = report.model
    yield from _wrapped("MODEL    ", f"{model.id}, {model.because}.")
    business = "" if model.commercial else "NOT FOR BUSINESS. "
    yield from _wrapped("LICENCE  ", f"{business}{model.license}: {model.obligation}")
    yield from _wrapped("FILE     ", f"{report.origin}, {len(report.nodes)} nodes")
    yield from (line for note in report.notes for line in _wrapped(" " * 9, note))


def _node(node: NodeTold) -> Iterator[str]:
    title = f' "{node.title}"' if node.title != node.kind else ""
    yield from _wrapped(f"{STATES[node.state]} {node.id:<4} ", f"{node.kind}{title}")
    yield from (_wrapped(" " * 9, node.meaning) if node.meaning else ())
    yield from (line for note in node.notes for line in _wrapped(" " * 9 + "Note: ", note))
    yield from (line for fault in node.faults for line in _wrapped(" " * 9 + "CANNOT: ", fault))


def _files(report: Report) -> Iterator[str]:
    yield from ["\nFILES"] * bool(report.files)
    for one in report.files:
        yield from _wrapped("  ", f"{one.name} ({one.folder})")
        yield from _wrapped("    ", f"{one.state}: {one.served_by}")


def _pictures(report: Report) -> Iterator[str]:
    yield from ["\nPICTURES"] * bool(report.pictures)
    for one in report.pictures:
        nodes = f"Node{'s' * (len(one.outputs) > 1)} {', '.join(one.outputs)}"
        many = f", in {len(one.passes)} passes" if len(one.passes) > 1 else ""
        changed = f", with {one.changes} changes after it is drawn" if one.changes else ""
        yield f"  {nodes}: {one.count} picture{'s' * (one.count > 1)}{many}{changed}"
        for number, each in enumerate(one.passes, 1):
            yield from _wrapped(f"    {number}. " if len(one.passes) > 1 else "    ", each.words)


def _costs(report: Report) -> Iterator[str]:
    if memory := report.memory:
        fits = "fits" if memory.fits else "DOES NOT FIT"
        yield "\nMEMORY AND TIME"
        yield from _wrapped(
            "  ", f"{memory.device}: {fits}: {memory.arithmetic} (by {memory.rests_on}). {memory.warning}"
        )
    if time := report.time:
        known = [("the pictures", time.pictures_s), ("a worker's start before them", time.start_s)]
        said = " and ".join(f"{value:.1f} s for {what}" for what, value in known if value is not None)
        price = "" if time.dollars is None else f", {time.dollars:.6f} dollars"
        yield from _wrapped("  ", f"About {said}{price}. {time.rests_on}" if said else time.rests_on)


def _wrapped(start: str, text: str) -> Sequence[str]:
    """`text` behind `start`, in as many lines as it needs."""
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((WIDEST, 24)).columns))
    rest = " " * len(start)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False)
