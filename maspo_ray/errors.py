"""The two ends a run can come to by somebody's fault.

Promise: a line reads `<field> is <value>; <rule>. <what to change>.`
"""


class ConfigError(ValueError):
    """The input is wrong: found before anything is started. The message is for the user, one line for each fault."""


class RunError(RuntimeError):
    """The run cannot go on. The message names the cause."""
