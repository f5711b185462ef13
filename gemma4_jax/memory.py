"""The process's own memory."""

import ctypes
import platform


def give_back_freed_memory() -> None:
    """Return what was freed to the system, such as what the compiler took: glibc would keep it. Elsewhere nothing is done."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
