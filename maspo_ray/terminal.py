"""Standard output and standard error as they may be: in any encoding, and gone.

Promise: nothing that is shown ends a run. A character that a terminal's encoding lacks is shown as `?`; what is written after the terminal
has closed, or after the reader of a pipe has gone, is lost.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class PatientStream:
    """A text stream that takes whatever is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            # Ended, or closed.
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[None]:
    """Within, the process's own two streams are patient; what is left in them at the end is written, if it can be."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PatientStream(sys.stdout), PatientStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _flush_or_forget(stream)


def _flush_or_forget(stream: TextIO) -> None:
    """Writes what a stream holds; where nobody takes it, the interpreter is not to try once more at its exit and fail."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
