"""What a server holds: overload, clients that vanish, a long mix of good, bad and cancelled requests, hostile clients.

Our own server with spark is started, driven over loopback, watched from outside (memory, descriptors) and stopped.

    overload      ten times as many requests as are served, Poisson, for a minute, at two sizes: pictures a second
                  against capacity, which a few clients find just before and just after; where the processor time went;
                  and every request has an answer, be it 429. In the smaller size a picture takes little longer
                  than the Python around it (this and flooded want a C compiler)
    disconnects   200 clients that go away while their picture waits or is drawn; then the same picture as before, bit
                  for bit, and nothing still at work
    mixed         1,000 requests, a quarter of them cancelled half-way and a quarter malformed in each of `BAD`'s ways
    sizes         pictures of random sizes, one after another: the slope of memory once each was drawn twice
    flooded       64 clients that ask again as soon as they are refused, beside good ones
    held          60 bodies of 7.8 MB that lack their last byte
    unread        100 clients that never read their answers
    bombs         images that ask a decoder for as much as they may
    fair          words, streams and edits, more of each than can wait: how often each is let in

Growth is the slope of a straight line through what was sampled after the first quarter, over all of it, in percent; in
overload that is all rounds of one size.
"""

import argparse
import asyncio
import json

import fair
import hostile
import mixed
import overload
import report
from serving import started
from watched import Watchdog, free_port

MODES = {
    "overload": overload.overload,
    "disconnects": mixed.disconnects,
    "mixed": mixed.mixed,
    "sizes": mixed.sizes,
    **hostile.MODES,
    "fair": fair.fair,
}


def main() -> None:
    """Measure, print a line for each mode, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="what to do (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="of overload and of sizes (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="of overload, at each size (default: 3)")
    parser.add_argument("--disconnects", type=int, default=200, help="clients that vanish (default: 200)")
    parser.add_argument("--requests", type=int, default=1000, help="of the mix (default: 1000)")
    parser.add_argument("--beside", type=float, default=12, help="seconds beside hostile clients (default: 12)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/endurance.json")
    options = parser.parse_args()
    with report.measuring("endurance", options.save) as found:
        for mode in options.mode:
            port = free_port()
            options.probes = f"http://127.0.0.1:{port}"
            with started(timeout=600, PORT_HEALTH=str(port)) as server:
                assert server.pid
                found[mode] = asyncio.run(MODES[mode](server, Watchdog(server.pid), options))
            print(mode, json.dumps(found[mode]), flush=True)


if __name__ == "__main__":
    main()
