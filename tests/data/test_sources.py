"""Sources: splits, places in error messages, empty and broken corpora."""

import json

import pytest

from gemma4_jax.data.options import DataOptions, data_defaults
from gemma4_jax.data.pipeline import compressed_bits_per_byte, get_tokenizer, heldout_text, make_dataset
from gemma4_jax.data.sources import SPLITS, open_source, open_whole_source, parse_mixture, text_of
from gemma4_jax.errors import ConfigError, DataError
from gemma4_jax.text.tokenizer import train_tokenizer

OPTIONS = DataOptions()


def texts(source, field="text"):
    return [text_of(source[i], field, source.place(i)) for i in range(len(source))]


def write_lines(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def test_python_stdlib_is_split_by_module():
    train, heldout = (open_source("python_stdlib", split, OPTIONS) for split in SPLITS)
    again = open_source("python_stdlib", "heldout", OPTIONS)
    assert again.paths == heldout.paths
    assert not set(train.paths) & set(heldout.paths)
    sizes = [sum(len(text.encode()) for text in texts(source)) for source in (train, heldout)]
    assert sum(sizes) > 5_000_000
    assert 0.04 < sizes[1] / sum(sizes) <= 0.05
    folder = next(path.rpartition("/json/")[0] for path in train.paths + heldout.paths if "/json/" in path)
    modules = [{path.removeprefix(folder + "/").split("/")[0] for path in source.paths} for source in (train, heldout)]
    assert not modules[0] & modules[1]
    assert not {"test", "encodings", "site-packages"} & (modules[0] | modules[1])


def test_text_files_are_documents(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_bytes(f"file {i}\r\nline\n".encode())
    train, heldout = (open_source(f"text:{tmp_path}/*.txt", split, OPTIONS) for split in SPLITS)
    assert (len(train), len(heldout)) == (38, 2)
    assert sorted(texts(train) + texts(heldout)) == sorted(f"file {i}\r\nline\n" for i in range(40))
    assert texts(open_source(f"text:{tmp_path}/*.txt", "heldout", OPTIONS)) == texts(heldout)


def test_a_single_text_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    train, heldout = (texts(open_source(f"text:{tmp_path}/book.txt", split, OPTIONS)) for split in SPLITS)
    assert train[0] + heldout[0] == text
    assert train[0].endswith("\n")
    assert 0 < len(heldout[0]) < 0.06 * len(text)


@pytest.mark.parametrize("text", ["ab", "a\n", "one long line without an end", "\n\n\n"])
def test_a_short_single_text_is_cut_too(tmp_path, text):
    (tmp_path / "book.txt").write_text(text)
    train, heldout = (texts(open_source(f"text:{tmp_path}/book.txt", split, OPTIONS)) for split in SPLITS)
    assert train[0] + heldout[0] == text
    assert train[0]
    assert heldout[0]


def test_json_lines_with_blank_lines_and_other_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n  \n{"text": "two"}')
    (tmp_path / "b.jsonl").write_text('{"text": "drei 🙂"}\r\n')
    source = open_whole_source(f"jsonl:{tmp_path}/*.jsonl", OPTIONS)
    assert texts(source) == ["one", "two", "drei 🙂"]
    assert [source.place(i).rpartition("/")[2] for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "b.jsonl:1"]
    assert texts(open_whole_source(f"jsonl:{tmp_path}/b.jsonl", OPTIONS)) == ["drei 🙂"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"body": "x"}', "no field 'text'; fields: 'body'"),
        (b'{"text": 3}', "field 'text' must be a string, got int"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good * 5 + line + b"\n" + good)
    data = DataOptions(source=f"jsonl:{tmp_path}/a.jsonl", heldout_source="python_stdlib")
    with pytest.raises(DataError, match=f"a.jsonl:6: {message}") as error:
        make_dataset(data, train_tokenizer(["good"], 300), "train", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run" / "data").iterdir()] == []


def test_bad_text_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 2"):
        open_whole_source(f"text:{tmp_path}/a.txt", OPTIONS)[0]


def test_empty_corpora(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"text:{tmp_path}/*.txt", "train", OPTIONS)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty corpus: 1 files without a line"):
        open_source(f"jsonl:{tmp_path}/empty.jsonl", "train", OPTIONS)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("")
    data = DataOptions(source=f"text:{tmp_path}/*.txt")
    with pytest.raises(DataError, match="empty corpus: 2 documents with 0 bytes"):
        make_dataset(data, train_tokenizer(["x"], 300), "train", tmp_path)


def test_unknown_kinds_list_the_choices():
    with pytest.raises(ConfigError, match=r"unknown data source 'txt'.*python_stdlib, text, jsonl, tfds"):
        open_source("txt:a", "train", OPTIONS)
    with pytest.raises(ConfigError, match="takes no argument"):
        open_source("python_stdlib:x", "train", OPTIONS)
    with pytest.raises(ConfigError, match="needs an argument, jsonl:GLOB"):
        open_source("jsonl", "train", OPTIONS)
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        open_source("python_stdlib", "test", OPTIONS)


def test_mixture_specs():
    assert parse_mixture("text:a=b/*.txt") == [("text:a=b/*.txt", 1.0)]
    assert parse_mixture("text:a,b.txt") == [("text:a,b.txt", 1.0)]
    assert parse_mixture("python_stdlib=0.7, text:x=3/*=3") == [("python_stdlib", 0.7), ("text:x=3/*", 3.0)]
    with pytest.raises(ConfigError, match=r"'b:x' has weight 0\.0"):
        parse_mixture("a=1,b:x=0")
    with pytest.raises(ConfigError, match="named twice"):
        parse_mixture("a=1,a=2")


def test_options():
    assert DataOptions.of(data_defaults()) == DataOptions()
    with pytest.raises(ConfigError, match=r"unknown field data.seqlen; choices: source, .*seq_len"):
        DataOptions.of({"seqlen": 3})
    wrong = {
        "seq_len": 1, "batch_size": 0, "workers": -1, "overlap": 0, "heldout_overlap": 128, "heldout_fraction": 1.0,
        "shuffle_seed": -1, "format": "x", "long_examples": "x",
    }  # fmt: skip
    for field, value in wrong.items():
        with pytest.raises(ConfigError, match=f"data.{field} must be .*{value}"):
            DataOptions.of({field: value})


def test_fingerprints_follow_contents(tmp_path):
    def prints(documents):
        write_lines(tmp_path / "a.jsonl", documents)
        return open_source(f"jsonl:{tmp_path}/a.jsonl", "train", OPTIONS).fingerprint()

    documents = [{"text": f"d{i}"} for i in range(5)]
    assert prints(documents) == prints(documents)
    assert prints(documents) != prints([{"text": "other"}, *documents[1:]])
    assert prints(documents) != prints(documents[::-1])
    train, heldout = (open_source(f"jsonl:{tmp_path}/a.jsonl", split, OPTIONS) for split in SPLITS)
    assert train.fingerprint() != heldout.fingerprint()


def test_separate_heldout_source(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"train {i}"} for i in range(5)])
    write_lines(tmp_path / "b.jsonl", [{"text": "held out"}])
    data = DataOptions(source=f"jsonl:{tmp_path}/a.jsonl", heldout_source=f"jsonl:{tmp_path}/b.jsonl", seq_len=16)
    assert heldout_text(data) == "held out"
    assert len(open_source(data.source, "train", data)) == 5
    both = DataOptions(source=f"jsonl:{tmp_path}/a.jsonl", heldout_source=f"jsonl:{tmp_path}/a.jsonl")
    with pytest.raises(ConfigError, match=r"heldout_source .* is also trained on"):
        heldout_text(both)


def test_compressed_size():
    assert compressed_bits_per_byte("abcd" * 10_000) < 0.1
    with pytest.raises(DataError, match="no text"):
        compressed_bits_per_byte("")


def test_trained_tokenizer_is_kept(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"some text {i}"} for i in range(30)])
    data = {"source": f"jsonl:{tmp_path}/a.jsonl", "vocab_size": 320}
    first = get_tokenizer(data, tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("tokenizer.json")}
    assert len(files) == 1
    assert get_tokenizer(data, tmp_path / "run").fingerprint() == first.fingerprint()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert get_tokenizer({**data, "vocab_size": 310}, tmp_path / "run").vocab_size == 310
    named = get_tokenizer({**data, "tokenizer": str(next(iter(files)).parent)}, tmp_path / "elsewhere")
    assert named.fingerprint() == first.fingerprint()
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ConfigError, match="vocab_size 5 is below"):
        get_tokenizer({**data, "vocab_size": 5}, tmp_path / "run")
