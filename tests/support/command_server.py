"""A process that has imported what commands need, and forks one off for each that is asked for.

`python command_server.py SOCKET` serves. With a program and arguments behind it, it asks for `lorary`, or for a script,
with its own folder, environment and standard streams, waits, and ends with that exit code. A start takes
milliseconds then, where imports take four seconds. Cold starts have tests of their own in `tests/e2e`.
"""

import json
import os
import runpy
import signal
import socket
import sys

STREAMS = ("stdin", "stdout", "stderr")
LONGEST = 1 << 20  # bytes of a request


def serve(place: str) -> None:
    """Fork a process for each request, until somebody ends this one."""
    _import_what_commands_need()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        print("ready", flush=True)
        while True:
            asking, _ = listening.accept()
            with asking:
                if os.fork() == 0:
                    listening.close()
                    return answer(asking)


def answer(asking: socket.socket) -> None:
    """Run what is asked for in a process of its own, and say how that ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, descriptors, _, _ = socket.recv_fds(asking, LONGEST, len(STREAMS))
    child = os.fork()
    if child == 0:
        asking.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
            # A stream remembers of what kind its file was.
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115 - as long as the process
            setattr(sys, STREAMS[number], stream)
        return run(**json.loads(text))
    _, status = os.waitpid(child, 0)
    asking.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(program: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Become the command `lorary`, or a script."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    sys.path[0] = folder if program == "lorary" else os.path.dirname(os.path.abspath(program))
    if program == "lorary":
        runpy.run_module("lorary", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def ask(place: str, program: str, *arguments: str) -> int:
    """Have a program run with the streams of this process; its exit code."""
    request = {"program": program, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        socket.send_fds(asking, [json.dumps(request).encode()], range(len(STREAMS)))
        return int(asking.recv(16) or 1)


def _import_what_commands_need() -> None:
    import pkgutil
    from importlib import import_module

    import lorary.recipes

    for module in pkgutil.iter_modules(lorary.recipes.__path__):
        import_module(f"lorary.recipes.{module.name}")
    for name in ("lorary.cli.app", "peft", "transformers.models.llama.modeling_llama"):
        import_module(name)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(*sys.argv[1:]))
