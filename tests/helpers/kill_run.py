"""Runs that are killed at moments drawn by lot, and one that is not.

    python kill_run.py FOLDER KILLS SEED HOW WORKERS [WORKERS …]

``FOLDER/whole`` is left alone. In ``FOLDER/killed-W-R`` (W data workers, run R) lives follow one another until the run is done;
two of them may be killed. Runs are added until each W has seen KILLS kills. HOW ``events``: by SIGKILL at the n-th thing that
happens in the run's folder (a file opened, renamed, removed, a folder made, in whatever thread) or in its data (a batch
taken). HOW ``times``: by an alarm's default action after so many milliseconds, in whatever code. Every life is a fork of
this process, which has imported everything but never used a device. Prints a JSON list of the lives: run, when it was to
die, how it ended.
"""

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import mini_train

from gemma4_jax.data.pipeline import BatchIterator
from gemma4_jax.train.feed import Feed
from gemma4_jax.train.loop import train

STEPS, BATCH, DOCUMENTS = 8, 8, 23
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
LOG = "batches.log"


class Recorder(BatchIterator):
    """Writes the place and the rows of every batch taken to the run's folder, each as a hash."""

    def __init__(self, dataset, log, event):
        super().__init__(dataset)
        self._log, self._event = log, event

    def __next__(self):
        batch = super().__next__()
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in batch["tokens"]]
        os.write(self._log, f"{self._row} {' '.join(rows)}\n".encode())
        self._event()
        return batch


class KillFeed(Feed):
    """A feed whose training batches are recorded."""

    def __init__(self, data, workdir, event):
        super().__init__(data, workdir)
        self._event = event
        self._log = os.open(workdir / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def train_iterator(self):
        return Recorder(self.train, self._log, self._event)


class Fate:
    """Kills this process at the n-th event, below 0 after so many milliseconds; 0: never."""

    def __init__(self, workdir, at):
        self.count, self._place, self._at = 0, str(workdir), at
        if at < 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, -at / 1000)

    def event(self):
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name, arguments):
        if name in EVENTS and isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(self._place):
            self.event()


def write_corpus(folder):
    """Documents of many lengths, each different."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{i} " + "ab " * (i % 5)}) for i in range(DOCUMENTS)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))


def live(folder, workdir, workers, kill_at):
    """One life; returns the number of events if it is not killed."""
    workdir.mkdir(exist_ok=True)
    fate = Fate(workdir, kill_at)
    data = {
        "source": f"jsonl:{folder}/corpus.jsonl", "vocab_size": 320, "seq_len": mini_train.SEQ_LEN, "batch_size": BATCH,
        "workers": workers, "heldout_fraction": 0.1,
    }  # fmt: skip
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    trainer = mini_train.mini_trainer(
        model=mini_train.mini_config(vocab_size=320),
        steps=STEPS,
        eval_every=4,
        checkpoint_every=1,
        keep=2,
        ema_decay=0.9,
    )
    feed = KillFeed(data, workdir, fate.event)
    sys.addaudithook(fate.audit)
    train(trainer, feed, workdir, files={"config.json": "{}"})
    return fate.count


def fork(folder, workdir, workers, kill_at):
    """A life in a process of its own: (exit status, events)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        count = live(folder, workdir, workers, kill_at)
        os.write(writer, str(count).encode())
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(text or 0)


def main(folder, kills, seed, how, workers):
    """All runs; see the module's text."""
    write_corpus(folder)
    began = time.monotonic()
    code, events = fork(folder, folder / "whole", 0, 0)
    milliseconds = int(1000 * (time.monotonic() - began))
    lives = [{"run": "whole", "at": 0, "code": code}]
    lot = random.Random(seed)
    for number in workers:
        killed = run = 0
        while killed < kills:
            name, code = f"killed-{number}-{run}", None
            for life in itertools.count():
                at = 0
                if life < 2 and killed < kills:
                    at = lot.randint(1, events) if how == "events" else -lot.randint(1, milliseconds)
                code, _ = fork(folder, folder / name, number, at)
                lives.append({"run": name, "at": at, "code": code})
                if code == 0:
                    break
                if code not in (-signal.SIGKILL, -signal.SIGALRM):
                    sys.exit(f"{lives[-1]} failed")
                killed += 1
            run += 1
    print(json.dumps(lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], [int(w) for w in sys.argv[5:]])
