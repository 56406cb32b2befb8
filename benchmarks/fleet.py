"""Which idle window, and how many workers, for your traffic on your platform, and what that costs: by simulation.

    python benchmarks/fleet.py --platform runpod --per-day 2000 --hours 8-22

Requests by chance, by the hours of a day, in bursts or of a file (`--trace`: a line each, seconds or an ISO 8601 time)
meet a fleet that starts workers as the platform does. Idle windows, always-on workers, most workers and the platform's
own number are tried; of those within `--p95` and `--lost` the cheapest is marked. A picture takes as long as `make
lower` predicts for the model and the GPU, unless `--seconds` says what you have measured; of a cold start `deploy` and
`doctor` tell how long it takes.

    python benchmarks/fleet.py --gpus 10 1000 100000      how many GPUs for so many requests a second
    python benchmarks/fleet.py --against-real --save      how well it foretells a real worker on this machine
"""

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import chart
import erlang
import foretold
import report
import traffic
from autoscalers import PLATFORMS, Platform
from handler import GPUS
from simulation import Fleet, Outcome, Service, quantile, simulate

LEAST, MOST = (0, 1), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CARDS = ("L40S", "H100", "H200")
MODELS = (("sdxl-turbo", "bf16"), ("flux-schnell", "fp8"), ("flux-dev", "fp8"))
LONG_S = 1e6  # that anything may take
Row = tuple[Fleet, Outcome]


def main() -> None:
    """Do what was asked for."""
    options = arguments()
    if options.against_real:
        with report.measuring("fleet", options.save) as figures:
            foretold.compare(options, figures)
    elif options.gpus:
        print(needed(options.gpus, options.platform))
    else:
        print(planned(options))


def arguments() -> argparse.Namespace:
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--platform", choices=PLATFORMS, default="runpod", help="whose rule and prices (default: runpod)")
    add("--per-day", type=number(0, 1e7), default=2000, help="requests (default: 2000)")
    add("--hours", type=hours, default=(0, 24), metavar="8-22", help="of the day in which they come (default: 0-24)")
    add("--shape", choices=traffic.SHAPES, default="diurnal", help="of the day (default: diurnal, most at its middle)")
    add("--trace", type=Path, help="a file of times instead of these")
    add("--seed", type=int, default=1, help="of the traffic (default: 1)")
    add("--model", default="flux-schnell", help="default: flux-schnell")
    add("--precision", default="fp8", help="default: fp8")
    add("--gpu", default="L40S", help="default: L40S")
    add("--seconds", type=number(1e-3, LONG_S), help="a picture takes (default: predicted of model, precision and GPU)")
    add("--fixed", type=number(0, LONG_S), default=0, help="seconds more each time, of one or many (default: 0)")
    add("--batch", type=number(1, 1000, int), default=1, help="pictures that a worker draws at once (default: 1)")
    add("--buffer", type=number(0, 1000, int), default=0, help="spare workers, on all but RunPod (default: 0)")
    add("--cold-start", type=number(0, LONG_S), default=90, help="seconds (default: 90)")
    add("--dollars-an-hour", type=number(0, 1e6), help="a worker costs (default: the platform's list price of the GPU)")
    add("--p95", type=number(0), default=30, help="seconds in which 95 of 100 pictures shall be there (default: 30)")
    add("--lost", type=number(0, 1), default=0.001, help="share that may be refused or give up (default: 0.001)")
    add("--queue", type=number(0), default=float("inf"), help="requests that may wait (default: any number)")
    add("--patience", type=number(0), default=float("inf"), help="seconds before who waits gives up (default: never)")
    add("--plot", type=Path, help="draw cost against time into this PNG")
    add("--gpus", type=number(1e-3, 1e7), nargs="+", metavar="RATE", help="how many GPUs serve these requests a second")
    add("--against-real", action="store_true", help="compare with a real worker on this machine")
    add("--side", type=int, default=256, help="of the pictures that it draws (default: 256)")
    add("--load", type=float, nargs="+", default=[0.6, 1.3], help="of what the worker can do (default: 0.6 1.3)")
    add("--for", type=float, default=60, dest="for_s", help="seconds of each load (default: 60)")
    add("--save", action="store_true", help="with --against-real: write benchmarks/results/fleet.json")
    return parser.parse_args()


def number(least: float, most: float = math.inf, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """What reads a number of that range."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (found := kind(text)) <= most:
                return found
        raise argparse.ArgumentTypeError(f"a number from {least:g} to {most:g} is wanted, not {text!r}")

    return read


def hours(text: str) -> tuple[float, float]:
    """Two hours of a day; ArgumentTypeError otherwise."""
    begin, _, end = text.partition("-")
    return number(0, 24)(begin), number(0, 24)(end)


def predicted(model: str, precision: str, gpu: str) -> float:
    """Seconds a picture of the model's own size and steps, by benchmarks/results/lowered.json."""
    known = json.loads((report.RESULTS / "lowered.json").read_text())["predictions"]
    found = [row["seconds"] for row in known if (row["model"], row["group"], row["card"]) == (model, precision, gpu)]
    if not found:
        raise SystemExit(f"Nothing is predicted for {model} in {precision} on {gpu}: say --seconds.")
    return float(found[0])


def price(options: argparse.Namespace) -> float:
    """Dollars a second."""
    if options.dollars_an_hour is not None:
        return float(options.dollars_an_hour) / traffic.HOUR
    rental = GPUS[options.gpu].rentals.get(options.platform) if options.gpu in GPUS else None
    if rental is None or rental.dollars_per_s is None:
        raise SystemExit(f"No price of {options.gpu} on {options.platform} is known: say --dollars-an-hour.")
    return rental.dollars_per_s


def needed(rates: Sequence[float], platform: str) -> str:
    """GPUs at which 95 of 100 requests wait no longer than one picture takes, and what they cost without a pause."""
    lines = [f"{'model':<14}{'precision':<11}{'GPU':<6}{'a picture':>10}" + "".join(f"{r:>14,.0f}/s" for r in rates)]
    lines[0] += f"{'per 1,000':>12}"
    for model, precision in MODELS:
        for card in CARDS:
            seconds, rental = predicted(model, precision, card), GPUS[card].rentals.get(platform)
            counts = [erlang.workers_for(rate, seconds, seconds) for rate in rates]
            dollars = 1000 * counts[-1] * ((rental and rental.dollars_per_s) or math.nan) / rates[-1]
            told = "".join(f"{number:>16,}" for number in counts)
            lines.append(f"{model:<14}{precision:<11}{card:<6}{seconds:>8.3f} s{told}{dollars:>12.3f}")
    return "\n".join(lines)


def planned(options: argparse.Namespace) -> str:
    """The table of the sweep, the cheapest that is good enough marked, and how to say it to the platform."""
    platform, dollars_per_s = PLATFORMS[options.platform], price(options)
    requests, fleet = asked(options), begun(options)
    rows = list(sweep(requests, 0.0 if options.trace else traffic.DAY, fleet, platform))
    best = cheapest(rows, options, dollars_per_s)
    shown = [cheapest(group, options, dollars_per_s) for group in groups(rows)]
    if options.plot:
        plot(shown, dollars_per_s, options.plot)
    good = within(best, options.p95, options.lost)
    head = (
        f"{len(requests):,} requests, {fleet.service.work_s:g} s each, a cold start of {options.cold_start:g} s; "
        f"{options.gpu} on {options.platform} at {dollars_per_s * traffic.HOUR:.2f} dollars an hour"
    )
    told = {"least": best[0].least, "most": best[0].most, "idle": best[0].idle_s, "value": best[0].rule.value}
    end = "* " + platform.words.format(**told) if good else NONE
    return "\n".join([head, TITLE, *(line(row, dollars_per_s, good and row == best) for row in shown), end])


def asked(options: argparse.Namespace) -> list[traffic.Request]:
    """The traffic."""
    try:
        found = (
            traffic.trace(options.trace)
            if options.trace
            else traffic.day(options.shape, options.per_day, options.hours, options.seed)
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"The trace cannot be read: {error}") from None
    if not found:
        raise SystemExit("Nobody asks for anything: let --per-day be more than 0, or --trace name a file with times.")
    return found


def begun(options: argparse.Namespace) -> Fleet:
    """What is the same in all that is tried."""
    platform = PLATFORMS[options.platform]
    seconds = options.seconds or predicted(options.model, options.precision, options.gpu)
    return Fleet(
        Service(seconds, options.fixed, options.batch, platform.between_s),
        replace(platform.rule, buffer=options.buffer),
        options.cold_start,
        idle_s=0,
        most=1,
        inside=max(platform.inside, options.batch),
        queue=options.queue,
        patience_s=options.patience,
    )


def sweep(requests: Sequence[traffic.Request], until: float, fleet: Fleet, platform: Platform) -> Iterator[Row]:
    """What becomes of the requests with each idle window, always-on workers, rule's number, and most workers.

    Of these no more than were ever wanted: another one would change nothing.
    """
    for idle, least, value in itertools.product(platform.idle_s, LEAST, platform.values):
        rule = replace(fleet.rule, value=value)
        for most in (number for number in MOST if number >= least):
            tried = replace(fleet, idle_s=idle, least=least, most=most, rule=rule)
            yield tried, (found := simulate(requests, tried, until))
            if found.peak < most:
                break


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Those that a line of the table stands for: an idle window down to zero, or so many that always run."""
    names = [(fleet.least, 0.0 if fleet.least else fleet.idle_s) for fleet, _ in rows]
    for name in dict.fromkeys(sorted(names)):
        yield [row for row, other in zip(rows, names, strict=True) if other == name]


def within(row: Row, p95_s: float, lost: float) -> bool:
    return quantile(row[1].latencies, 0.95) <= p95_s and row[1].lost <= lost


def cheapest(rows: Sequence[Row], options: argparse.Namespace, dollars_per_s: float) -> Row:
    """Of those that are good enough, or else the one that loses least and then is quickest."""
    good = [row for row in rows if within(row, options.p95, options.lost)]
    if good:
        return min(good, key=lambda row: (row[1].per_thousand(dollars_per_s), row[0].most))
    return min(rows, key=lambda row: (row[1].lost, quantile(row[1].latencies, 0.95)))


NONE = "None of these is good enough: more workers that always run, or a faster GPU, might be."
TITLE = "   idle s  workers       another   p50 s   p95 s   p99 s   lost   cold  GPU hours  dollars  per 1,000"
RULES = {"count": "for each {:g}", "delay": "after {:g} s"}


def line(row: Row, dollars_per_s: float, best: bool) -> str:
    fleet, found = row
    p50, p95, p99 = (quantile(found.latencies, share) for share in (0.5, 0.95, 0.99))
    return (
        f"{'*' if best else ' '} {fleet.idle_s:>7g}{f'{fleet.least} to {fleet.most}':>9}"
        f"{RULES[fleet.rule.by].format(fleet.rule.value):>14}{p50:>8.2f}{p95:>8.2f}{p99:>8.2f}{found.lost:>7.1%}"
        f"{found.cold_share:>7.1%}{found.gpu_s / traffic.HOUR:>11.2f}{found.gpu_s * dollars_per_s:>9.2f}"
        f"{found.per_thousand(dollars_per_s):>11.2f}"
    )


def bar(row: Row, dollars_per_s: float) -> dict[str, float]:
    """What the dollars for 1,000 pictures were paid for."""
    found = row[1]
    idle_s = found.gpu_s - found.starting_s - found.busy_s
    share = found.per_thousand(dollars_per_s) / found.gpu_s
    return {"drawing": found.busy_s * share, "starting": found.starting_s * share, "idle": idle_s * share}


def plot(shown: Sequence[Row], dollars_per_s: float, path: Path) -> None:
    """A bar for each row of the table."""
    bars = {}
    for fleet, found in shown:
        name = f"{fleet.least} always on" if fleet.least else f"idle for {fleet.idle_s:g} s"
        bars[f"{name}: {quantile(found.latencies, 0.95):.3g} s"] = bar((fleet, found), dollars_per_s)
    parts = ("drawing", "starting", "idle")
    title = "dollars for 1,000 pictures, by idle window; at its name, the seconds in which 95 of 100 are there"
    chart.stacked(bars, parts, path, title, "${:.2f}")


if __name__ == "__main__":
    main()
