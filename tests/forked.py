"""A script run in a fork of the tests' process: a process of its own, that may be killed, without the time of imports."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

FORK = multiprocessing.get_context("fork")


def run_forked(script: str | Path, *arguments) -> subprocess.CompletedProcess:
    """As `subprocess.run` of ``python script *arguments`` with what it prints captured."""
    pipes = os.pipe(), os.pipe()
    process = FORK.Process(target=_run, args=(str(script), list(map(str, arguments)), *(end for _, end in pipes)))
    process.start()
    printed = {}

    def read(number: int) -> None:
        with os.fdopen(pipes[number][0]) as end:
            printed[number] = end.read()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for (_, end), reader in zip(pipes, readers, strict=True):
        os.close(end)
        reader.start()
    for thread in (process, *readers):
        thread.join()
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, printed[0], printed[1])


def _run(script: str, arguments: list[str], *ends: int) -> None:
    for number, end in enumerate(ends, start=1):
        os.dup2(end, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv, sys.path[:0] = [script, *arguments], [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")
