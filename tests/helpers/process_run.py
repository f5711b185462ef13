"""A mini run of several processes on this machine: ``python process_run.py WORKDIR STOP COUNT STEPS DATA FSDP TENSOR``.

With STOP above 0 the last process alone gets a SIGTERM when it takes the batch of that number (from 0). Each process is a
fork of this one with as many devices as ``XLA_FLAGS`` says, joined over loopback; process 0 writes the metrics. Each writes
the first tokens of its rows of every batch to ``WORKDIR/rows-COUNT-PROCESS``.
"""

import os
import signal
import socket
import sys
from pathlib import Path

import jax
import mini_train

from gemma4_jax.train import distributed
from gemma4_jax.train.loop import train
from gemma4_jax.train.signals import Interrupted


class PartData(mini_train.MiniData):
    """The rows of one part of each batch; a SIGTERM to this process alone when a given batch is asked for."""

    def __init__(self, mesh, log, stop_at=None):
        super().__init__(stop_at)
        self._part, self._log = distributed.batch_part(mesh), log

    def cut(self, batch):
        index, count = self._part
        size = len(batch["tokens"]) // count
        return {name: value[index * size : (index + 1) * size] for name, value in batch.items()}

    def train_iterator(self):
        return _Parts(self.batches(), self)

    def heldout_batches(self, limit):
        return [self.cut(batch) for batch in super().heldout_batches(limit)]


class _Parts(mini_train._Recorder):
    def __next__(self):
        batch = self._data.cut(super().__next__())
        with self._data._log.open("a") as file:
            file.write(" ".join(map(str, batch["tokens"][:, 0])) + "\n")
        return batch


def run(workdir, port, stop, count, process, steps, mesh):
    """One process."""
    distributed.start(
        distributed.DistributedConfig(
            start="explicit",
            coordinator=f"127.0.0.1:{port}",
            num_processes=count,
            process_id=process,
            timeout_seconds=120,
        )
    )
    trainer = mini_train.mini_trainer(
        mesh=mesh, optimizer=mini_train.SLOW, steps=steps, eval_every=10, checkpoint_every=10, keep=3
    )
    stop_at = stop if stop and process == count - 1 else None
    data = PartData(trainer.mesh, workdir / f"rows-{count}-{process}", stop_at)
    try:
        train(trainer, data, workdir, files={"config.json": "{}"})
    except Interrupted as stop:
        jax.distributed.shutdown()
        sys.stdout.flush()
        os._exit(128 + stop.signal)


def main():
    """Forks and waits; the exit code is that of the first process that failed."""
    workdir, (stop, count, steps, *mesh) = Path(sys.argv[1]), map(int, sys.argv[2:])
    workdir.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for process in range(count):
        child = os.fork()
        if child == 0:
            run(workdir, port, stop, count, process, steps, tuple(mesh))
            jax.distributed.shutdown()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next((code if code > 0 else 128 + abs(code) for code in codes if code), 0))


if __name__ == "__main__":
    signal.alarm(280)  # a process that waits for one that died must not wait for ever
    main()
