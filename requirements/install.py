"""Installs a lock into a virtual environment: `python requirements/install.py VENV LOCK [PROJECT]`, which is what `make setup` runs.

Promise: PyTorch's index of CPU builds is asked for torch and for nothing else, so that no package of another's can come from there; what is
being waited for is said; a failure is one line with the package, where it was looked for and what to do, and the next try goes on from
there. Needs no package itself. Environment: TORCH_CPU_INDEX, that index; UV, a `uv` to install all but torch with, empty for pip.
"""

# For whatever Python is there, which is told if it is too old.
from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

VERSIONS = ((3, 11), (3, 13))
QUIET_S = 15.0
_UNKNOWN, _SILENT = "no cause was given", "it gave no answer"


class SetupError(Exception):
    """What ends the set-up, as one line."""


def main(arguments: list[str]) -> int:
    if not VERSIONS[0] <= sys.version_info[:2] <= VERSIONS[1]:
        return say_error(
            f"PYTHON is {sys.version.split()[0]}; the lock is for Python 3.11 to 3.13. Set it to one, such as make setup PYTHON=python3.12."
        )
    try:
        install(Path(arguments[0]), Path(arguments[1]), arguments[2:])
    except SetupError as error:
        return say_error(str(error))
    return 0


def say_error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


def install(venv: Path, lock: Path, projects: list[str]) -> None:
    if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
        raise SetupError(
            f"{venv} is not made; python -m venv failed as shown above. Install what it asks for (on Debian: python3-venv)."
        )
    python, log = str(venv / "bin" / "python"), venv / "setup.log"
    log.write_text("")
    packages = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps"]
    torch = next((line for line in packages if line.startswith("torch==")), None)
    if torch is not None:
        _install_torch(pip, torch, os.environ.get("TORCH_CPU_INDEX", ""), log)
    rest = venv / "without-torch.txt"
    rest.write_text("".join(f"{line}\n" for line in packages if line != torch))
    uv = os.environ.get("UV", "")
    installer = [uv, "pip", "install", "--python", python, "--no-deps"] if uv else pip
    print(
        f"the other {len(packages) - (torch is not None)} packages of {lock}, with {'uv' if uv else 'pip (a minute or two)'}",
        flush=True,
    )
    run = Run([*installer, "-r", str(rest)], log, "the first answer")
    if not run.succeeded:
        again = " Without uv: make setup UV=." if uv else ""
        raise SetupError(
            f"{run.package or 'a package'} is not installed; looked for at {run.indexes}: {run.last_error}. Check the connection, a proxy "
            f"or the index, then run make setup again, which goes on from here.{again} The whole log is {log}."
        )
    for project in projects:
        run = Run([*pip, "--no-build-isolation", "--editable", project], log, project)
        if not run.succeeded:
            raise SetupError(f"{project} is not installed; {run.last_error}. The whole log is {log}.")


def _install_torch(pip: list[str], torch: str, index: str, log: Path) -> None:
    """Installs torch from where pip looks by itself, else from PyTorch's index, which is not asked for anything else."""
    print(f"{torch} (about 200 MB), from where pip looks by itself", flush=True)
    if (first := Run([*pip, torch], log, torch)).succeeded:
        return
    if not index:
        raise SetupError(
            f"{torch} is not installed; looked for at {first.indexes}: {first.last_error}. Set TORCH_CPU_INDEX."
        )
    print(f"not there; {torch} from {index}", flush=True)
    second = Run([*pip, "--index-url", index, "--timeout", "30", "--retries", "2", torch], log, f"{torch} from {index}")
    if not second.succeeded:
        raise SetupError(
            f"{torch} is not installed; looked for at {first.indexes} ({first.last_error}) and at {index} ({second.last_error}). Check "
            f"the connection or a proxy, or set TORCH_CPU_INDEX to a mirror of PyTorch's CPU builds. The whole log is {log}."
        )


class Run:
    """A command of pip's or uv's, run to its end while what it waits for is said.

    Attributes:
        package: the one that it was at last.
        indexes: where it looked.
    """

    def __init__(self, command: list[str], log: Path, waits_for: str) -> None:
        self.package, self.indexes, self.last_error = "", "PyPI", _UNKNOWN
        self._doing, self._answers = waits_for, 0
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(process, lines), daemon=True).start()
        with log.open("a") as file:
            while True:
                try:
                    line = lines.get(timeout=QUIET_S)
                except queue.Empty:
                    print(f"  waiting: {self._doing}", flush=True)
                    continue
                if line is None:
                    break
                file.write(line)
                self._note(line.strip())
        self.succeeded = process.wait() == 0

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def _note(self, line: str) -> None:
        if found := re.match(r"Looking in indexes: (.*)", line):
            self.indexes = found.group(1)
        elif found := re.match(r"(Collecting|Downloading) (\S+)", line):
            if found.group(1) == "Collecting":
                self.package = found.group(2)
            self._doing = line.split(" (from ")[0]
            self._answers += 1
            if self._answers % 50 == 0:
                print(f"  {self._doing}", flush=True)
        elif line.startswith("Installing collected packages"):
            self._doing = "writing the packages to disk"
        elif "Retrying" in line:
            self.last_error = _SILENT
            # It ends in the path that was asked for, as in `…: /simple/numpy/`.
            asked = line.rstrip("/").rpartition("/")[2]
            print(f"  no answer about {asked}, trying again", flush=True)
        if found := re.match(r"(?:ERROR|error|×|cause|  cause):? ?(.*)", line):
            # pip's last line is "No matching distribution"; a cause that it gave before says more.
            if self.last_error != _SILENT and not (self.last_error != _UNKNOWN and "No matching distribution" in line):
                self.last_error = found.group(1).partition(" (from versions")[0].rstrip(".")[:300]
            if named := re.search(r"requirement (\S+)|[Ff]ailed to (?:fetch|download|build) `?([^`\s:]+)", line):
                self.package = named.group(1) or named.group(2) or self.package


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
