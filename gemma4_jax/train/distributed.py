"""Runs of several processes: how they find each other, and what they do together.

One process a host (or a device). All see the same workdir. Process 0 writes what is written once; checkpoints are written
and read by all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gemma4_jax.config import unknown_name
from gemma4_jax.errors import ConfigError
from gemma4_jax.train.sharding import BATCH_AXES

START = ("none", "auto", "explicit")
COLLECTIVES = ("gloo", "mpi")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Fields of ``config.distributed``: where a run is placed, not what it computes.

    start: ``none`` (one process), ``auto`` (what SLURM, Open MPI, Kubernetes or a TPU slice says), or ``explicit`` (the three
    fields that follow). coordinator: ``HOST:PORT`` of process 0. num_processes, process_id: how many, and which one this is.
    cpu_collectives: what carries sums between CPU devices. timeout_seconds: how long to wait for the other processes.
    """

    start: str = "none"
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    cpu_collectives: str = "gloo"
    timeout_seconds: int = 300

    def __post_init__(self):
        for field, choices in (("start", START), ("cpu_collectives", COLLECTIVES)):
            if getattr(self, field) not in choices:
                raise unknown_name(f"distributed.{field}", getattr(self, field), choices)
        if self.timeout_seconds < 1:
            raise ConfigError(f"distributed.timeout_seconds is {self.timeout_seconds}; it must be at least 1")
        if self.start != "explicit":
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ConfigError(f"distributed.coordinator is {self.coordinator!r}; it must be HOST:PORT of process 0")
        if self.num_processes < 1:
            raise ConfigError(f"distributed.num_processes is {self.num_processes}; it must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"distributed.process_id is {self.process_id}; it must be in 0…{self.num_processes - 1} "
                f"(distributed.num_processes {self.num_processes})"
            )


def start(config: DistributedConfig) -> None:
    """Join the other processes; before anything asks for a device. Nothing to do when ``start`` is ``none``.

    Raises:
      ConfigError: no scheduler found, or the other processes did not come.
    """
    if config.start == "none" or active():
        return
    jax.config.update("jax_cpu_collectives_implementation", config.cpu_collectives)
    # The loop lets all processes stop at the same step; the service's own handler would take the signals away from it.
    jax.config.update("jax_enable_preemption_service", False)
    where: dict[str, Any] = {}
    if config.start == "explicit":
        where = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(**where, initialization_timeout=config.timeout_seconds)
    except (RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"distributed.start {config.start!r} failed: {line}") from error


def active() -> bool:
    """Whether this is one of several processes of a run. Asks for no device."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return not active() or jax.process_index() == 0


def on_main(action: Callable[[], None]) -> None:
    """Do something in process 0 while the others wait. An error there is one in all of them.

    Raises:
      ConfigError: in the other processes, when process 0 raised a ValueError; there it is that error.
    """
    if not active():
        action()
        return
    error: ValueError | None = None
    if is_main():
        try:
            action()
        except ValueError as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
    if error is not None:
        raise error
    if failed:
        raise ConfigError("process 0 refused this run; its message says why")


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process feeds, of how many: the rows that its devices hold.

    Processes whose devices differ only along ``tensor`` feed the same part.

    Raises:
      ConfigError: its devices hold rows that are no even part, naming the axes.
    """
    pieces = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = mesh.devices.reshape(pieces, -1)
    own = [piece for piece in range(pieces) if any(d.process_index == jax.process_index() for d in rows[piece])]
    first, size = own[0], len(own)
    if own != list(range(first, first + size)) or pieces % size or first % size:
        raise ConfigError(
            f"process {jax.process_index()} holds pieces {own} of {pieces} on axes {' x '.join(BATCH_AXES)}: no even part; "
            f"make mesh.tensor divide or be a multiple of the {jax.local_device_count()} devices of a process"
        )
    return first // size, pieces // size


def total(value: float, mesh: Mesh) -> float:
    """The sum over all parts of a batch (see ``batch_part``) of a number that each process has of its own part."""
    if not active():
        return float(value)
    copies = jax.process_count() // batch_part(mesh)[1]
    return float(np.sum(multihost_utils.process_allgather(np.float32(value)), dtype=np.float64)) / copies


def section(config: Mapping[str, Any]) -> DistributedConfig:
    """``config.distributed``, or that of one process in configs without the section."""
    return DistributedConfig(**dict(config.get("distributed") or {}))
