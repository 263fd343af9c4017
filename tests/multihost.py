"""Runs a function of a test's module on several hosts, which are processes of this machine.

As a program it is one of these processes: MODULE FUNCTION FOLDER DEVICES.
"""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

SECONDS = 240  # most seconds that a process may take


def run_on_hosts(processes, function, folder, hosts=2, devices=2):
    """Calls `function(folder)` in `hosts` processes of `devices` devices each.

    Raises AssertionError with the end of its output if a process fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    module = Path(sys.modules[function.__module__].__file__).stem
    command = [sys.executable, __file__, module, function.__name__, str(folder), str(devices)]
    started = []
    for number in range(hosts):
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address}
        environment |= {"JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(number)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(processes.start(command, env=environment, **pipes))
    for process in started:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output[-3000:]


def main(module, function, folder, devices):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    import conftest  # noqa: F401  eight devices, strict dtypes

    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    from musicrl_jax.core import hosts

    hosts.join()
    getattr(importlib.import_module(module), function)(Path(folder))
    hosts.end(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
