"""Run commands in forks of a process that has imported everything: a test then waits for the command, not for PyTorch.

Each line on stdin is a job as JSON: `args`, `cwd`, `environment`, `stdout` and `stderr` (files), `timeout` (seconds).
Each line on stdout is an exit status. Services, killed runs and the run of digits that many tests share start from a
bare interpreter, as a user's do.
"""
import atexit
import gc
import json
import os
import signal
import sys
import traceback

import captum.attr  # noqa: F401
import cleanlab  # noqa: F401
import onnxscript  # noqa: F401

import imgcls_nb.all  # noqa: F401
from imgcls_nb.cli import main


def run(job: dict) -> None:
    "What a shell does for a command; ends this process."
    code = 1
    try:
        os.chdir(job['cwd'])
        os.environ.clear()
        os.environ.update(job['environment'])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(('stdout', 'stderr'), 1):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.alarm(job['timeout'])
        sys.argv = ['imgcls', *job['args']]
        code = main(job['args'])
    except SystemExit as end: code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException: traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code or 0)  # libraries in C++ would wait for threads that a fork does not have


gc.freeze()  # so that collections in the forks leave these pages shared
for line in sys.stdin:
    if not (child := os.fork()): run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
