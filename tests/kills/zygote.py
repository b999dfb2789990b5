"""A process that has imported everything and computed nothing: commands are forked from it, each in milliseconds.

Run as `python -m tests.kills.zygote`: a line of JSON on standard input asks for a command, one on standard output
tells that it began or ended. It opens no channel and runs no tensor, so that its children begin as new processes do.
"""

import importlib
import json
import os
import runpy
import signal
import sys
from types import FrameType
from typing import Any

WARM = (
    *("transformers.models.llama.modeling_llama", "peft", "safetensors.torch", "grpc.aio"),
    *("cloud_node.cli", "cloud_node.node", "cloud_node.building", "cloud_node.in_process", "emulator.build"),
    *("edge_client.cli", "edge_client.train", "edge_client.submitting"),
)


def tell(**what: Any) -> None:
    """One whole line; a pipe takes so few bytes at once."""
    os.write(1, (json.dumps(what) + "\n").encode())


def reap(_: int = 0, __: FrameType | None = None) -> None:
    """Tell of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        tell(ended=pid, code=os.waitstatus_to_exitcode(status))


def become(command: dict[str, Any]) -> None:
    """In the child: run `python -m ARGUMENTS` with its own environment, its output in a file."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.update(command["environment"])
    if "user" in command:
        os.setgroups([])
        os.setgid(command["user"])
        os.setuid(command["user"])
    sys.argv = ["-", *command["arguments"][1:]]
    code = 0
    try:
        runpy.run_module(command["arguments"][0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 (what a new process would print too)
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main() -> None:
    """Fork what is asked for until standard input ends; what still runs then is killed."""
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, reap)
    children = []
    tell(ready=os.getpid())
    for line in sys.stdin:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # or an end might be told before its beginning
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        children.append(pid)
        tell(began=pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in children:
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
        except ChildProcessError:
            pass


if __name__ == "__main__":
    main()
