"""What drawing several pictures at once gains, learned from the worker's own, where `optimize` has not measured it.

Of a shape the first are drawn one by one, then two at once as soon as as many wait, then twice that, for as long as it
pays. Only so many runs are looked at, so that what was decided stays, and with it what becomes of a seed.
"""

import threading
from collections import OrderedDict

from handler.core.recipe import Recipe
from handler.engine.batching import COUNTS, PAYS, batchable, room, shape

TRIES = 3  # runs of so many at once, of which the quickest counts: the first is cold, and others may be disturbed
SHAPES = 64  # that are known: callers choose them


class Learned:
    """Seconds of a picture, by how many of its shape were drawn at once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Recipe, dict[int, list[float]]] = OrderedDict()

    def after(self, recipe: Recipe, count: int, seconds: float) -> None:
        """So many pictures of one shape were drawn at once, in so many seconds."""
        if count not in COUNTS or room(recipe.size) == 1 or not batchable(recipe):
            return  # the last: it has images, which nobody shall keep
        of = shape(recipe)
        with self._lock:
            runs = self._known.setdefault(of, {}).setdefault(count, [])
            if len(runs) < TRIES:
                runs.append(seconds / count)
            self._known.move_to_end(of)
            if len(self._known) > SHAPES:
                self._known.popitem(last=False)

    def at_once(self, recipe: Recipe) -> int:
        """How many such pictures to draw at once: as many as were quickest, or are to be tried next."""
        with self._lock:
            known = self._known.get(shape(recipe), {})
            least = {count: min(runs) for count, runs in known.items() if len(runs) == TRIES}
        best, most = 1, room(recipe.size)
        for count in (each for each in COUNTS if each <= most):
            if count not in least:
                return count
            if count > 1 and (least[best] < least[count] or least[1] < PAYS * least[count]):
                break
            best = count
        return best
