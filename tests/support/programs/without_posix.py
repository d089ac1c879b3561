"""What Windows has not is taken away: `python without_posix.py COMMANDS PROGRAM` runs both then.

Libraries are imported before, with all they want; what is left to fail is ours. An open file can
still be renamed and removed here, which is the part of Windows that this cannot show.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

LIBRARIES = (
    "accelerate asyncio concurrent.futures huggingface_hub llguidance logging.handlers "
    "multiprocessing onnx_ir onnxruntime optimum.modeling_base sklearn.cluster starlette "
    "subprocess tempfile tokenizers torch torch.distributed.checkpoint.state_dict "
    "transformers.masking_utils "
    "transformers.models.llama.modeling_llama transformers.models.qwen3.modeling_qwen3 "
    "transformers.trainer uvicorn"
)
MODULES = "curses fcntl grp pty pwd readline resource syslog termios tty"
IN_OS = (
    "fchmod fork get killpg mkfifo posix_ pread preadv pwrite pwritev readv "
    "register_at_fork sched_ setsid statvfs sysconf uname wait O_CLOEXEC O_DIRECT "
    "O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC"
)
KEPT = ("get_exec_path", "get_terminal_size", "getcwd", "getenv", "getpid", "getppid", "getlogin")
IN_MMAP = ("MADV_", "MAP_", "PROT_")
IN_SIGNAL = (
    "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 pthread_ "
    "setitimer siginterrupt sigwait"
)
PACKAGES = ("edge_memllm", "edge_memllm_runtimes", "edge_memllm_export")


def hide() -> None:
    for name in LIBRARIES.split():
        import_module(name)
    sys.modules |= dict.fromkeys(MODULES.split())  # type: ignore[arg-type]
    take_away(os, tuple(IN_OS.split()))
    take_away(mmap, IN_MMAP)
    take_away(signal, tuple(IN_SIGNAL.split()))
    os.supports_dir_fd.clear()
    os.open = without_folders(os.open)
    ctypes.CDLL = named_only(ctypes.CDLL)  # type: ignore[misc,assignment]
    sys.platform = "win32"
    os.environ["EDGE_MEMLLM_KERNELS"] = "none"  # what is compiled here is not for Windows


def take_away(module: Any, beginnings: tuple[str, ...]) -> None:
    for name in dir(module):
        if name.startswith(beginnings) and name not in KEPT:
            delattr(module, name)


def without_folders(real: Callable[..., int]) -> Callable[..., int]:
    def open_file(path: Any, *rest: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *rest, **more)

    return open_file


def named_only(real: type) -> Callable[..., Any]:
    def library(name: str | None, *rest: Any, **more: Any) -> Any:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return real(name, *rest, **more)

    return library


def every_module() -> list[str]:
    """Import all there is; return what could not be imported, and why."""
    failed = []
    for package in PACKAGES:
        for found in walk_packages(import_module(package).__path__, f"{package}."):
            if found.name.endswith(("__main__", "evaluation.harness")):  # runs; wants lm_eval
                continue
            try:
                import_module(found.name)
            except BaseException as error:
                failed.append(f"{found.name}: {error!r}")
    return failed


if __name__ == "__main__":
    hide()
    from edge_memllm.cli.main import main

    failed = every_module()
    codes = [main(words) for words in json.loads(sys.argv[1])]
    exec(sys.argv[2])
    print(json.dumps({"failed": failed, "codes": codes}))
