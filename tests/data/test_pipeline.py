"""The pipeline: epochs, resuming, processes, workers, mixtures, checkpoints, the token store."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from gemma4_jax.data import compressed_bits_per_byte, heldout_text, learnt_bytes, make_dataset
from gemma4_jax.data.token_store import TokenStore, with_new_folder
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.text.tokenizer import train_tokenizer

NUM_DOCUMENTS = 57


def document(i, name="doc"):
    return f"{name} {i} " + "lorem ipsum " * (i % 7)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document(i, "doc other") for i in range(NUM_DOCUMENTS)], 340)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name in ("doc", "other"):
        lines = [json.dumps({"text": document(i, name)}) for i in range(NUM_DOCUMENTS)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(workdir):
    return {
        "source": f"jsonl:{workdir}/doc.jsonl", "heldout_source": f"jsonl:{workdir}/other.jsonl",
        "seq_len": 16, "batch_size": 4, "shuffle_seed": 3,
    }  # fmt: skip


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def row_keys(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_batches_have_fixed_shapes_and_types(data, tokenizer, workdir):
    for split in ("train", "heldout"):
        batch = next(iter(make_dataset(data, tokenizer, split, workdir)))
        kinds = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
        ints = ((4, 16), "int32")
        assert kinds == {"tokens": ints, "segment_ids": ints, "positions": ints, "loss_mask": ((4, 16), "bool")}
        assert (batch["tokens"][batch["segment_ids"] > 0] == 2).sum() > 0
        assert not batch["loss_mask"][batch["tokens"] == 2].any()


def test_each_row_once_per_epoch_in_another_order(data, tokenizer, workdir):
    dataset = make_dataset({**data, "batch_size": 5}, tokenizer, "train", workdir)
    assert dataset.num_rows % 5  # so that batches straddle epochs
    keys = row_keys(take(iter(dataset), dataset.num_rows))  # five epochs
    epochs = [keys[i : i + dataset.num_rows] for i in range(0, len(keys), dataset.num_rows)]
    assert len(epochs) == 5
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert len(set(epochs[0])) == dataset.num_rows


def test_heldout_holds_all_the_text_exactly_once(data, tokenizer, workdir):
    lengths = tokenizer.byte_lengths()
    text = heldout_text(data)
    assert text == "".join(document(i, "other") for i in range(NUM_DOCUMENTS))
    for overlap in (1, 8):
        dataset = make_dataset({**data, "heldout_overlap": overlap}, tokenizer, "heldout", workdir)
        batches = list(dataset)
        assert len(batches) == dataset.num_batches
        assert sum(learnt_bytes(batch, lengths) for batch in batches) == len(text.encode())
        assert_equal(batches, list(dataset))
    assert 0 < compressed_bits_per_byte(text) < 8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 8))
def test_resuming_anywhere_continues_the_same(tokenizer, workdir, before, after):
    data = {"source": f"jsonl:{workdir}/doc.jsonl", "seq_len": 16, "batch_size": 3}
    dataset = make_dataset(data, tokenizer, "train", workdir)
    whole = take(iter(dataset), before + after)
    first = iter(dataset)
    assert_equal(take(first, before), whole[:before])
    state = json.loads(json.dumps(first.get_state()))
    second = iter(make_dataset(data, tokenizer, "train", workdir))
    second.set_state(state)
    assert_equal(take(second, after), whole[before:])
    first.set_state(state)
    assert_equal(take(first, after), whole[before:])


def test_resuming_with_other_batches_reads_on_at_the_same_row(data, tokenizer, workdir):
    iterator = iter(make_dataset(data, tokenizer, "train", workdir))
    keys = row_keys(take(iterator, 9))
    small = iter(make_dataset({**data, "batch_size": 2}, tokenizer, "train", workdir))
    take(small, 3)
    state = small.get_state()
    iterator.set_state(state)
    assert row_keys(take(iterator, 7)) == keys[6:34]


def test_state_of_other_data_is_refused(data, tokenizer, workdir):
    state = iter(make_dataset(data, tokenizer, "train", workdir)).get_state()
    for change in ({"shuffle_seed": 4}, {"seq_len": 17}, {"source": f"jsonl:{workdir}/o*.jsonl", "heldout_source": ""}):
        other = iter(make_dataset({**data, **change}, tokenizer, "train", workdir))
        with pytest.raises(DataError, match="saved position is in other data"):
            other.set_state(state)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_processes_share_out_the_same_global_batches(data, tokenizer, workdir, count, split):
    whole = make_dataset(data, tokenizer, split, workdir)
    steps = whole.num_batches or 25
    parts = [make_dataset(data, tokenizer, split, workdir, i, count) for i in range(count)]
    assert {part.num_batches for part in parts} == {whole.num_batches}
    iterators = [iter(part) for part in parts]
    for batch in take(iter(whole), steps):
        local = [next(iterator) for iterator in iterators]
        assert_equal([{name: np.concatenate([part[name] for part in local]) for name in batch}], [batch])
    states = [iterator.get_state() for iterator in iterators]
    assert all(state == states[0] for state in states)


def test_processes_that_do_not_divide_the_batch(data, tokenizer, workdir):
    with pytest.raises(ConfigError, match=r"data.batch_size 4 is not a multiple of 3 processes"):
        make_dataset(data, tokenizer, "train", workdir, 0, 3)
    with pytest.raises(ConfigError, match="process_index 2 is not below process_count 2"):
        make_dataset(data, tokenizer, "train", workdir, 2, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, tokenizer, workdir, workers):
    alone = take(iter(make_dataset(data, tokenizer, "train", workdir)), 12)
    iterator = iter(make_dataset({**data, "workers": workers}, tokenizer, "train", workdir))
    assert_equal(take(iterator, 5), alone[:5])
    state = iterator.get_state()
    assert_equal(take(iterator, 3), alone[5:8])
    iterator.set_state(state)
    iterator.start_prefetch()
    assert_equal(take(iterator, 7), alone[5:])
    iterator.close()
    with pytest.raises(ValueError, match="closed iterator"):
        next(iterator)


def test_mixture_follows_the_weights(data, tokenizer, workdir):
    source = f"jsonl:{workdir}/doc.jsonl=0.75,jsonl:{workdir}/other.jsonl=0.25"
    data = {**data, "source": source, "heldout_source": "", "heldout_fraction": 0.1}
    dataset = make_dataset(data, tokenizer, "train", workdir)
    iterator = iter(dataset)
    keys = row_keys(take(iterator, 100))
    state = iterator.get_state()
    rows = [report["rows"] for report in dataset.reports]
    single = make_dataset({**data, "source": f"jsonl:{workdir}/doc.jsonl"}, tokenizer, "train", workdir)
    of_first = set(row_keys(take(iter(single), single.num_rows)))
    is_first = np.asarray([key in of_first for key in keys])
    assert is_first.sum() == 300
    assert all(abs(is_first[:n].sum() - 0.75 * n) <= 1 for n in range(1, 400))
    for rows_of_one, mine in ((rows[0], is_first), (rows[1], ~is_first)):
        own = [key for key, chosen in zip(keys, mine, strict=True) if chosen]
        epochs = [own[i : i + rows_of_one] for i in range(0, len(own) - rows_of_one + 1, rows_of_one)]
        assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
        assert all(len(set(epoch)) == rows_of_one for epoch in epochs)
    following = take(iterator, 5)
    again = iter(make_dataset(data, tokenizer, "train", workdir))
    again.set_state(state)
    assert_equal(take(again, 5), following)
    assert sum(1 for _ in make_dataset(data, tokenizer, "heldout", workdir)) > 0
    assert dataset.packing_efficiency > 0.8


def test_orbax_saves_and_restores_the_position(data, tokenizer, workdir, tmp_path):
    dataset = make_dataset(data, tokenizer, "train", workdir)
    iterator = iter(dataset)
    take(iterator, 7)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
    following = take(iterator, 5)
    restored = iter(make_dataset(data, tokenizer, "train", workdir))
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": restored})
    assert_equal(take(restored, 5), following)
    # A run on more processes reads the same position.
    (state,) = (tmp_path / "checkpoint" / "data").glob("process_*.json")
    state.rename(state.with_name("process_0-of-4.json"))
    restored = iter(make_dataset(data, tokenizer, "train", workdir))
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": restored})
    assert_equal(take(restored, 5), following)


def test_documents_are_tokenised_once(data, tokenizer, workdir):
    make_dataset(data, tokenizer, "train", workdir)
    files = {path: path.stat().st_mtime_ns for path in (workdir / "data").rglob("*") if path.is_file()}
    make_dataset({**data, "seq_len": 20, "shuffle_seed": 9}, tokenizer, "train", workdir)
    assert {path: path.stat().st_mtime_ns for path in (workdir / "data").rglob("*") if path.is_file()} == files
    make_dataset({**data, "append_eos": False}, tokenizer, "train", workdir)
    assert len([path for path in (workdir / "data").rglob("*") if path.is_file()]) > len(files)


def test_eos_ends_documents_if_asked(data, tokenizer, workdir):
    for eos in (True, False):
        dataset = make_dataset({**data, "append_eos": eos}, tokenizer, "heldout", workdir)
        assert sum((batch["tokens"] == 1).sum() for batch in dataset) == NUM_DOCUMENTS * eos


def test_large_tables_are_stored_in_four_bytes(data, workdir, tmp_path):
    tokenizer = train_tokenizer(["abc"], 70_000)
    make_dataset(data, tokenizer, "train", tmp_path)
    (store,) = (tmp_path / "data").glob("tokens-*")
    assert TokenStore.open(store).tokens.dtype == np.uint32


def test_a_store_cut_off_in_the_middle_is_made_anew(data, tokenizer, workdir, tmp_path):
    """Kills a process while it writes; what it leaves behind is neither used nor kept."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from gemma4_jax.data.token_store import with_new_folder\n"
        "def write(folder):\n"
        "    (folder / 'tokens.bin').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "with_new_folder(Path(sys.argv[1]), write)\n"
    )
    expected = make_dataset(data, tokenizer, "train", workdir)
    (name,) = {plan.store.path.name for plan in expected._assemble._plans}
    (tmp_path / "data").mkdir()
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "data" / name)], check=False, timeout=120)
    assert killed.returncode == -9
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert_equal(take(iter(make_dataset(data, tokenizer, "train", tmp_path)), 3), take(iter(expected), 3))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]


def test_the_first_of_two_writers_wins(tmp_path):
    def write(folder):
        (folder / "who").write_text("second")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "who").write_text("first")

    with_new_folder(tmp_path / "store", write)
    assert (tmp_path / "store" / "who").read_text() == "first"
    assert os.listdir(tmp_path) == ["store"]
