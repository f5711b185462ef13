"""TFDS: building array_record datasets from JSONL without tensorflow, and reading them."""

import json
import subprocess
import sys

import pytest

from gemma4_jax.data import DataOptions, get_tokenizer, make_dataset
from gemma4_jax.data.sources import open_source
from gemma4_jax.data.tfds_build import build, main
from gemma4_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    texts = [{"text": f"document {i} é🙂\n", "number": i} for i in range(40)]
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "model", "content": f"a{i}"}]} for i in range(40)
    ]
    for name, documents in (("text", texts), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
        build(f"jsonl:{folder}/{name}.jsonl", f"my_{name}", folder, format=name, heldout_fraction=0.1)
    return folder


def documents(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("name", ["text", "chat"])
def test_what_was_written_is_read(folder, name):
    options = DataOptions(data_dir=str(folder), format=name)
    parts = {s: documents(open_source(f"tfds:text_corpus/my_{name}", s, options)) for s in ("train", "heldout")}
    assert (len(parts["train"]), len(parts["heldout"])) == (36, 4)
    original = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    wanted = [{key: value for key, value in document.items() if key != "number"} for document in original]
    key = json.dumps
    assert sorted(map(key, map(sort_keys, parts["train"] + parts["heldout"]))) == sorted(
        map(key, map(sort_keys, wanted))
    )


def sort_keys(value):
    return json.loads(json.dumps(value, sort_keys=True))


@pytest.mark.parametrize("name", ["text", "chat"])
def test_training_batches(folder, tmp_path, name):
    data = {
        "source": f"tfds:text_corpus/my_{name}", "data_dir": str(folder), "format": name, "vocab_size": 320,
        "seq_len": 48, "batch_size": 2,
    }  # fmt: skip
    tokenizer = get_tokenizer(data, tmp_path)
    batch = next(iter(make_dataset(data, tokenizer, "train", tmp_path)))
    text = tokenizer.decode(batch["tokens"][0][batch["loss_mask"][0]])
    assert text.startswith("document " if name == "text" else "a")
    mixed = {**data, "source": f"{data['source']}=0.5,jsonl:{folder}/{name}.jsonl=0.5"}
    assert len(make_dataset(mixed, tokenizer, "train", tmp_path).reports) == 2


def test_tensorflow_is_not_needed(folder, tmp_path):
    program = (
        "import sys\n"
        "from gemma4_jax.data.tfds_build import main\n"
        "from gemma4_jax.data.sources import DataOptions, open_source\n"
        "assert main(sys.argv[1:]) == 0\n"
        "options = DataOptions(data_dir=sys.argv[-1])\n"
        "print(open_source('tfds:text_corpus/again', 'train', options)[0]['text'], end='')\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('tensorflow', 'torch')]\n"
    )
    arguments = ["--source", f"jsonl:{folder}/text.jsonl", "--name", "again", "--data_dir", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2].endswith(f"--config.data.source=tfds:text_corpus/again --config.data.data_dir={tmp_path}")
    assert lines[-1].startswith("document ")


def test_contents_decide_the_fingerprint(folder, tmp_path):
    options = DataOptions(data_dir=str(folder))
    first = open_source("tfds:text_corpus/my_text", "train", options).fingerprint()
    assert open_source("tfds:text_corpus/my_text", "train", options).fingerprint() == first
    (tmp_path / "b.jsonl").write_text((folder / "text.jsonl").read_text().replace("document", "documenT"))
    build(f"jsonl:{tmp_path}/b.jsonl", "my_text", tmp_path, heldout_fraction=0.1)
    other = DataOptions(data_dir=str(tmp_path))
    assert open_source("tfds:text_corpus/my_text", "train", other).fingerprint() != first


def test_errors(folder, tmp_path, capsys):
    options = DataOptions(data_dir=str(tmp_path))
    with pytest.raises(DataError, match=f"no TFDS dataset 'text_corpus/nothing' under {tmp_path}"):
        open_source("tfds:text_corpus/nothing", "train", options)
    with pytest.raises(ConfigError, match="'a b' must be one word"):
        build("text:x", "a b", tmp_path)
    wrong = ["--source", f"jsonl:{folder}/text.jsonl", "--name", "bad", "--data_dir", str(tmp_path), "--format", "chat"]
    assert main(wrong) == 3
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("field 'messages' must be a list of messages, got NoneType")
    )
    assert not list(tmp_path.rglob("*.array_record*"))
    assert main(["--source", "nothing:x", "--name", "bad", "--data_dir", str(tmp_path)]) == 2
    assert "unknown data source 'nothing'" in capsys.readouterr().err


def test_messages_that_do_not_fit_are_named(tmp_path):
    message = {"role": "model", "content": "x", "tool_calls": []}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": [message]})] * 2))
    with pytest.raises(DataError, match=r"a.jsonl:\d: message 0 has content, role, tool_calls; only"):
        build(f"jsonl:{tmp_path}/a.jsonl", "tools", tmp_path, format="chat")
