"""Dry runs of many commands, each as a person's own process would see it: ``python dry_runs.py < COMMANDS > OUTCOMES``.

Lists of arguments as JSON on stdin; an exit code and what went to stderr for each, as JSON on stdout. Packages are imported
once; each command has a fork of its own, where jax has not asked for devices yet, so that a plan can make up as many as its
mesh needs.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
import types

import launch
from gemma4_jax.train import memory_plan


def outcome(arguments):
    """Exit code and stderr of one command."""
    # The plan's own tests compile the steps that it measures.
    memory_plan.measure = lambda *_: types.SimpleNamespace(table=lambda: "not measured")
    memory_plan.advice = lambda *_: ()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = launch.main(arguments)
        except Exception:  # no exit code is 0 then: the test that asks for 0 shows the traceback
            code = traceback.format_exc()
    return code, errors.getvalue()


def in_a_fork(arguments):
    """``outcome``, in a process that starts from the imports alone."""
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if not child:
            try:
                json.dump(outcome(arguments), answer)
                answer.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        text = answer.read()
    return json.loads(text) if text else ("died", "")


if __name__ == "__main__":
    json.dump([in_a_fork(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
