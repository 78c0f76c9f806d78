"""Where the actor that is a role's replica now is found.

Promise: whoever calls actors holds this instead of their handles, so that a replica that has been replaced is called by its new handle.
"""

from typing import Any, Protocol


class Handles(Protocol):
    """Looks actors up, for each call."""

    def handle(self, role: str, replica: int) -> Any: ...

    def count(self, role: str) -> int: ...
