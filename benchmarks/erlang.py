"""Erlang's formulas for queues at which requests come by chance: what fleet.py is held against, and large fleets by.

Times of service vary as chance has it (exponentially), more than those of pictures do, so real waits are shorter.
"""

import math


def blocked(load: float, workers: int) -> float:
    """Erlang B: the share refused where nobody may wait; `load` is arrivals a second by seconds of service."""
    found = 1.0
    for number in range(1, workers + 1):
        found = load * found / (number + load * found)
    return found


def waiting(load: float, workers: int) -> float:
    """Erlang C: the share that has to wait, 1 where there are too few workers for the load."""
    if load >= workers:
        return 1.0
    refused = blocked(load, workers)
    return workers * refused / (workers - load * (1 - refused))


def refused(load: float, workers: int, places: int) -> float:
    """The share refused where `places` may wait: M/M/c/K with K = workers + places."""
    ratio, full = load / workers, blocked(load, workers)
    line = [ratio**place for place in range(1, places + 1)]
    return full * (line[-1] if line else 1.0) / (1 + full * math.fsum(line))


def mean_wait_s(rate: float, service_s: float, workers: int) -> float:
    """Of all requests, those that do not wait included."""
    return waiting(rate * service_s, workers) * service_s / (workers - rate * service_s)


def workers_for(rate: float, service_s: float, within_s: float, share: float = 0.95) -> int:
    """The least number of workers at which `share` of the requests begin within so many seconds."""
    load = rate * service_s
    least, most = math.floor(load) + 1, 2 * math.ceil(load) + 10
    while least < most:
        middle = (least + most) // 2
        late = waiting(load, middle) * math.exp(-(middle - load) * within_s / service_s)
        least, most = (least, middle) if late <= 1 - share else (middle + 1, most)
    return least
