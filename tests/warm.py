"""Run commands in forks of a process that has imported everything: a test then waits for the command, not for PyTorch.

Each line on stdin is a job as JSON: `args`, `cwd`, `environment`, `stdout` and `stderr` (files), `timeout` (seconds).
Each line on stdout is an exit status. The real command, from a bare interpreter, is what the services and killed
runs of the tests are.
"""
import atexit
import json
import os
import signal
import sys

import captum.attr  # noqa: F401
import cleanlab  # noqa: F401
import onnxscript  # noqa: F401

import imgcls_nb.all  # noqa: F401
from imgcls_nb.cli import main


def run(job: dict) -> None:
    "What a shell does for a command; ends this process."
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['environment'])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(('stdout', 'stderr'), 1):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.alarm(job['timeout'])
    sys.argv = ['imgcls', *job['args']]
    try: code = main(job['args'])
    except SystemExit as end: code = end.code or 0
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(code)  # libraries in C++ would wait for threads that a fork does not have


for line in sys.stdin:
    if not (child := os.fork()): run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
