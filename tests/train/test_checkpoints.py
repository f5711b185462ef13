"""Checkpoints: strict, atomic, readable, movable between meshes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import mini_train as mini
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_jax.errors import CheckpointError
from gemma4_jax.train import checkpoints as ckpt
from gemma4_jax.train import trees
from gemma4_jax.train.optimizer import OptimizerConfig
from gemma4_jax.train.sharding import MeshConfig, make_mesh
from gemma4_jax.train.state import from_items, to_items


def weights():
    return {
        "model": {
            "table": jnp.arange(48, dtype=jnp.float32).reshape(8, 6) / 7,
            "layers": {"0": {"weight": jnp.linspace(-1, 1, 5).astype(jnp.bfloat16)}},
        },
        "count": jnp.asarray(16777217, jnp.int32),
    }


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_equal(a, b):
    flat_a, flat_b = trees.flatten(a), trees.flatten(b)
    assert flat_a.keys() == flat_b.keys()
    for name, leaf in flat_a.items():
        assert leaf.dtype == flat_b[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flat_b[name]), err_msg=name)


@pytest.fixture
def saved(tmp_path):
    ckpt.save(tmp_path / "one", {"params": weights()}, files={"config.json": "{}"}, metadata={"step": 7})
    return tmp_path / "one"


def test_round_trip(saved):
    assert_equal(ckpt.load_params(saved), weights())
    assert_equal(ckpt.load_params(saved, shapes(weights())), weights())
    assert ckpt.read_manifest(saved) == {"step": 7}
    assert (saved / "config.json").read_text() == "{}"


def changed(path, leaf):
    flat = trees.flatten(shapes(weights()))
    flat.pop(path, None)
    if leaf is not None:
        flat[path] = leaf
    return trees.unflatten(flat)


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("count", jax.ShapeDtypeStruct((), jnp.float32), "count has dtype int32 there but float32"),
        ("model/table", jax.ShapeDtypeStruct((8, 6), jnp.bfloat16), "model/table has dtype float32 .* bfloat16"),
        ("model/table", jax.ShapeDtypeStruct((9, 6), jnp.float32), r"model/table has shape \(8, 6\) .* \(9, 6\)"),
        ("model/table", None, "has unexpected model/table"),
        ("model/more", jax.ShapeDtypeStruct((1,), jnp.float32), "lacks model/more"),
    ],
)
def test_differences_are_refused_by_name(saved, path, leaf, message):
    """Orbax itself would turn int32 16777217 into float32 16777216 without a word."""
    with pytest.raises(CheckpointError, match=message):
        ckpt.load_params(saved, changed(path, leaf))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1), (2, 2, 2)], ids=str)
def test_saved_on_eight_devices_restored_on_others(tmp_path, mesh):
    def placed(shape):
        devices = jax.devices()[: int(np.prod(shape))]
        return NamedSharding(make_mesh(MeshConfig(*shape), devices), P("fsdp"))

    tree = {"w": jax.device_put(jnp.arange(64, dtype=jnp.float32).reshape(8, 8) / 3, placed((1, 8, 1)))}
    ckpt.save(tmp_path / "c", {"params": tree})
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=placed(mesh))}
    loaded = ckpt.load_params(tmp_path / "c", target)["w"]
    assert loaded.sharding == target["w"].sharding
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(tree["w"]))


def test_the_best_is_kept_beside_the_newest(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    for metric, best in (("next_token_loss", 2), ("acceptance_1", 1)):
        run = ckpt.Checkpoints(tmp_path / metric, keep=2, best=metric)
        assert run.best() is None
        for step, loss in losses.items():
            metadata = {} if loss is None else {"evaluation": {metric: loss}}
            run.save(step, {"params": {"w": jnp.full((2,), step)}}, metadata=metadata)
        run.wait()
        assert run.best() == best
        assert ckpt.list_steps(run.directory) == [best, 4, 5]


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    """The thread writes what was there when save returned, whatever happens to the buffers."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    run = ckpt.Checkpoints(tmp_path, keep=9)
    tree = {f"w{i}": jnp.arange(200_000, dtype=jnp.float32).reshape(400, 500) + i for i in range(4)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), tree)
    for step in (1, 2):
        run.save(step, {"params": tree})
        overwrite(overwrite(tree))
        tree = jax.tree.map(jnp.array, expected)
    run.wait()
    for step in (1, 2):
        assert_equal(ckpt.load_params(tmp_path / ckpt.step_name(step)), expected)


def test_the_average_goes_before_the_weights(tmp_path):
    """Raw weights stay readable; the average of those that have one is used otherwise, in their dtypes."""
    mean = {"model": {"layers": {"0": {"weight": jnp.full((5,), 0.3, jnp.float32)}}}}
    ckpt.save(tmp_path / "c", {"params": weights(), "average": mean})
    assert_equal(ckpt.load_params(tmp_path / "c", average=False), weights())
    expected = weights()
    expected["model"]["layers"]["0"]["weight"] = jnp.full((5,), 0.3, jnp.bfloat16)
    assert_equal(ckpt.load_params(tmp_path / "c", shapes(weights())), expected)


def test_nothing_is_overwritten(saved):
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        ckpt.save(saved, {"params": weights()})


def test_keep_last_and_newest(tmp_path):
    run = ckpt.Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        run.save(step, {"params": weights()})
    run.wait()
    assert ckpt.list_steps(run.directory) == [2, 3]
    assert ckpt.newest(tmp_path).name == ckpt.step_name(3)
    _, metadata = run.restore_newest({"params": shapes(weights())})
    assert metadata["step"] == 3


def truncate(folder):
    file = max((f for f in folder.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-10])


def scribble(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:16] + b"\x00" * (file.stat().st_size - 16))


def delete_item(folder):
    (folder / "params" / "_METADATA").unlink()


def delete_manifest(folder):
    (folder / ckpt.MANIFEST).unlink()


def break_manifest(folder):
    (folder / ckpt.MANIFEST).write_text("{")


# Orbax's reader may be collected after its event loop has ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, scribble, delete_item, delete_manifest, break_manifest])
def test_damaged_newest_is_skipped(tmp_path, caplog, damage):
    run = ckpt.Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2):
        run.save(step, {"params": weights()})
    run.wait()
    damage(run.directory / ckpt.step_name(2))
    run.clean()
    items, metadata = run.restore_newest({"params": shapes(weights())})
    assert metadata["step"] == 1
    assert_equal(items["params"], weights())
    assert "00000002" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    run = ckpt.Checkpoints(tmp_path, keep=3)
    run.save(1, {"params": weights()})
    run.wait()
    truncate(run.directory / ckpt.step_name(1))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read.*00000001 is damaged"):
        run.restore_newest({"params": shapes(weights())})


def test_a_wrong_model_is_refused_not_skipped(tmp_path):
    run = ckpt.Checkpoints(tmp_path, keep=3)
    run.save(1, {"params": weights()})
    with pytest.raises(CheckpointError, match="model/table has shape"):
        run.restore_newest({"params": changed("model/table", jax.ShapeDtypeStruct((16, 6), jnp.float32))})


def test_half_written_folders_are_removed(tmp_path):
    run = ckpt.Checkpoints(tmp_path, keep=3)
    run.save(1, {"params": weights()})
    run.wait()
    for name in ("00000002", "00000003.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    run.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001"]


def test_nothing_there(tmp_path):
    assert ckpt.Checkpoints(tmp_path / "none", keep=1).restore_newest({"params": {}}) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        ckpt.newest(tmp_path)


def test_disk_that_refuses(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ckpt.StorageError, match="cannot write checkpoint"):
        ckpt.save(tmp_path / "file" / "c", {"params": weights()})


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
from gemma4_jax.errors import CheckpointError
from gemma4_jax.train import checkpoints
run = checkpoints.Checkpoints(sys.argv[1], keep=1)
run.save(1, {"params": {"w": jnp.zeros((8,))}})
run.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = (jnp.arange(200_000) * 7919 % 65_521).astype(jnp.float32)  # does not compress
run.save(2, {"params": {"w": noise}})
try:
    run.save(3, {"params": {"w": noise}})
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_harms_no_older_checkpoint(tmp_path):
    """The system refuses to let any file grow: the next save says so, and the one before the refusal is whole."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    (line,) = done.stdout.splitlines()
    assert "cannot write checkpoint" in line and "00000002: " in line and "older ones are untouched" in line
    assert ckpt.list_steps(tmp_path / "c") == [1]
    np.testing.assert_array_equal(ckpt.load_params(tmp_path / "c" / ckpt.step_name(1))["w"], np.zeros(8))


def test_a_training_state_survives(trainer, tmp_path):
    state = trainer.init()
    ckpt.save(tmp_path / "c", to_items(state))
    items = ckpt.restore(tmp_path / "c", to_items(trainer.abstract))
    again = from_items(items, trainer.abstract)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_training_state_moves_between_meshes(tmp_path, name):
    """Weights, average and all an optimiser keeps: from 8 devices to 1 and 4, bit for bit; never to another model."""

    def on(mesh, **model):
        optimizer = OptimizerConfig(name=name, warmup_steps=1)
        return mini.mini_trainer(model=mini.mini_config(**model), mesh=mesh, optimizer=optimizer, ema_decay=0.9)

    state = on((2, 2, 2)).init()
    ckpt.save(tmp_path / "c", to_items(state))
    for mesh in ((1, 1, 1), (1, 4, 1)):
        target = on(mesh)
        again = from_items(ckpt.restore(tmp_path / "c", to_items(target.abstract)), target.abstract)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        assert jax.tree.map(lambda leaf: leaf.sharding, again) == target.shardings
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    with pytest.raises(CheckpointError, match=r"embedder/table has shape \(64, \d+\) there but \(80, \d+\) is needed"):
        ckpt.restore(tmp_path / "c", to_items(on((1, 1, 1), vocab_size=80).abstract))


def test_the_files_are_plain(saved):
    """Readable without this package: JSON, and a nested dict of arrays by name."""
    manifest = json.loads((saved / ckpt.MANIFEST).read_text())
    assert "params/_METADATA" in manifest["files"] and "config.json" in manifest["files"]
    assert set(ckpt.describe(saved)) == {"model/table", "model/layers/0/weight", "count"}
