"""Loading FAISS, the one door to it: whether it is there, whether it can use a GPU, how many threads it takes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmfilter.errors import MissingExtra, MMFilterError


def faiss_message(error: Exception) -> str:
    """What FAISS says without where it says it."""
    return (str(error).splitlines() or [type(error).__name__])[0].rpartition("failed: ")[2]


_TRIAL = """
import faiss
if not faiss.get_num_gpus():
    raise SystemExit("it sees none")
resources = faiss.StandardGpuResources()
index = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(8))
vectors = faiss.rand((64, 8))
index.add(vectors)
index.search(vectors, 4)
"""


def check_gpu() -> None:
    """Raise `MMFilterError` unless FAISS has GPU support and can search on one.

    It is tried in another process, because FAISS ends its own where the driver or the GPU does not fit.
    """
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        raise MMFilterError(
            f"--gpu: this FAISS ({faiss.__version__}) is for CPUs: pip uninstall faiss-cpu, then pip install "
            "'mmfilter[gpu]'"
        )
    trial = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, text=True)
    if trial.returncode:
        lines = [line for line in trial.stderr.splitlines() if line.strip()] or [f"exit status {trial.returncode}"]
        raise MMFilterError(
            f"--gpu: FAISS ({faiss.__version__}) cannot use a GPU here ({lines[-1].strip()}); go without --gpu"
        )


def check_installed() -> None:
    """Raise `MissingExtra` when there is no FAISS, without loading it."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingExtra("the index over codes", "cpu")


def load_faiss() -> Any:
    """The library. Raises `MissingExtra` without one, `MMFilterError` when it cannot be loaded."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise _unusable(error) from error
        raise MissingExtra("the index over codes", "cpu") from error
    except (ImportError, OSError, RuntimeError) as error:  # a library that it needs is missing or another's
        raise _unusable(error) from error
    return faiss


def _unusable(error: Exception) -> MMFilterError:
    anew = "pip uninstall faiss-cpu faiss-gpu, then pip install 'mmfilter[cpu]'"
    return MMFilterError(
        f"FAISS is installed but cannot be loaded ({faiss_message(error)}); install what it lacks, or it anew: {anew}"
    )


@contextmanager
def threads(workers: int | None) -> Iterator[None]:
    """FAISS with so many threads inside the block; None leaves it as it is."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    if workers is not None:
        faiss.omp_set_num_threads(workers)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
