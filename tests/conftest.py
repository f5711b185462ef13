"""Eight CPU devices before jax is imported; compiled programs shared by all processes of a run; the folder of helpers."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0: machine code as it comes. Tests compile far more than they compute; the optimised HLO is the same.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "helpers"))
# What one process compiles, the other workers and the commands that tests start read from here, in this run only.
_OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="compiled")
if _OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

MANY_MAPS = 20_000


@pytest.fixture(scope="module")
def short_query_blocks():
    """Attention in runs of four query rows and more, so that short rows have several."""
    from gemma4_jax.model import attention  # not before jax has its devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", 4)
        yield


@pytest.fixture(scope="module", autouse=True)
def spare_memory_maps():
    """Linux gives a process 65 530 memory maps, every compiled program takes some, and XLA crashes without one left."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        import jax

        jax.clear_caches()


def pytest_sessionfinish():
    """The first process made the folder, and its workers have ended."""
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
