"""How often Python looks for cycles among its objects.

Promise: within `collecting_rarely` cycles are still found, and afterwards all is as before. Frees nothing itself.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG_OBJECTS = 1_000_000


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Lets the collector look only when 1,000,000 objects more are alive than at its last look, by default 700.

    With thousands of groups in flight their tasks and coroutines are alive for minutes and in no cycle, and looking through them
    again and again is a third of what the controller does.
    """
    before = gc.get_threshold()
    gc.set_threshold(_YOUNG_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
