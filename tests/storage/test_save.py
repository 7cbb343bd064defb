"""Writing models: atomic whatever happens, weights not copied without need, memory bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from onnxtools.ir.model import Model
from tests.support import (
    ROOT,
    Array,
    Session,
    external,
    info,
    initializers,
    linear,
    normal,
    refuse,
    run,
    stored,
    succeed,
    write,
)

W = normal(64, 128)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def locations(path: Path) -> set[str]:
    """Data files that the graph at `path` refers to."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def product(*weights: str) -> list[onnx.NodeProto]:
    """x through several square products; each weight is a name."""
    return [
        helper.make_node("MatMul", [f"h{i}" if i else "x", w], [f"h{i + 1}" if i + 1 < len(weights) else "y"], f"mm{i}")
        for i, w in enumerate(weights)
    ]


def square(path: Path, **weights: Array) -> Path:
    size = next(iter(weights.values())).shape[0]
    return external(write(path, product(*weights), [info("x", [1, size])], [info("y", [1, size])], stored(**weights)))


# --- where weights go -------------------------------------------------------------------------------------------------


def test_the_same_folder_refers_to_the_same_data_file(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    before = stamp(tmp_path / "weights.bin")
    result = succeed("convert", path, tmp_path / "out.onnx")
    assert "weights.bin" in result.out and "--copy-weights" in result.out
    assert names(tmp_path) == ["in.onnx", "out.onnx", "weights.bin"]
    assert stamp(tmp_path / "weights.bin") == before
    assert np.array_equal(initializers(tmp_path / "out.onnx")["w"], W)


def test_copy_weights_makes_the_output_self_contained(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    succeed("convert", path, tmp_path / "out.onnx", "--copy-weights")
    assert locations(tmp_path / "out.onnx") == {"out.onnx.data"}
    for name in ("in.onnx", "weights.bin"):
        (tmp_path / name).unlink()
    assert np.array_equal(initializers(tmp_path / "out.onnx")["w"], W)


def test_another_folder_gets_its_own_bytes(tmp_path: Path) -> None:
    """No link of any kind: onnx and onnx_ir refuse a data file that has one."""
    path = external(linear(tmp_path / "in.onnx"))
    (tmp_path / "other").mkdir()
    succeed("convert", path, tmp_path / "other" / "out.onnx")
    data = tmp_path / "other" / "out.onnx.data"
    assert (
        not data.is_symlink()
        and data.stat().st_nlink == 1
        and data.stat().st_ino != (tmp_path / "weights.bin").stat().st_ino
    )
    path.unlink()
    (tmp_path / "weights.bin").unlink()
    assert np.array_equal(initializers(tmp_path / "other" / "out.onnx")["w"], W)


def test_a_folder_reached_through_a_link_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = external(linear(tmp_path / "real" / "in.onnx"))
    succeed("convert", path, tmp_path / "link" / "out.onnx")
    assert names(tmp_path / "real") == ["in.onnx", "out.onnx", "weights.bin"]


def test_a_data_file_in_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = external(linear(tmp_path / "in.onnx"), "data/weights.bin")
    succeed("convert", path, tmp_path / "out.onnx")
    assert locations(tmp_path / "out.onnx") == {"data/weights.bin"}
    (tmp_path / "other").mkdir()
    succeed("convert", path, tmp_path / "other" / "out.onnx")
    assert np.array_equal(initializers(tmp_path / "other" / "out.onnx")["w"], W)


def test_a_changed_weight_goes_to_a_new_file_and_the_rest_stays(tmp_path: Path) -> None:
    path = square(tmp_path / "in.onnx", a=normal(64, 64), b=normal(64, 64, seed=1))
    before = stamp(tmp_path / "weights.bin")
    succeed("prune", path, tmp_path / "out.onnx", "--exclude", "b")
    assert locations(tmp_path / "out.onnx") == {"weights.bin", "out.onnx.data"}
    assert stamp(tmp_path / "weights.bin") == before
    assert (tmp_path / "out.onnx.data").stat().st_size == 64 * 64 * 4
    assert np.array_equal(initializers(tmp_path / "out.onnx")["b"], normal(64, 64, seed=1))


@pytest.mark.parametrize("size", [7, 255, 256, 1000])
def test_weights_of_odd_sizes_and_types_survive_a_copy(size: int, tmp_path: Path) -> None:
    """Small ones, an empty one, bytes, 16-bit and packed 4-bit ones, at unaligned offsets."""
    arrays = {
        "a": normal(size, 3),
        "b": normal(5).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "c": np.arange(size, dtype=np.int64),
        "d": np.arange(size, dtype=np.uint8),
    }
    four = helper.make_tensor(
        "e",
        TensorProto.INT4,
        [size],
        np.random.default_rng(0).bytes((size + 1) // 2 - size % 2) + b"\x03" * (size % 2),
        raw=True,
    )
    nodes = [helper.make_node("Size", [name], [f"n_{name}"]) for name in (*arrays, "e")] + [
        helper.make_node("Neg", ["x"], ["y"])
    ]
    path = external(
        write(
            tmp_path / "in.onnx",
            nodes,
            [info("x", [2])],
            [info("y", [2]), *(info(f"n_{n}", [], TensorProto.INT64) for n in (*arrays, "e"))],
            [*stored(**arrays), four],
            opset=21,
        )
    )
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "out.onnx"
    Model.load(path).save(out)
    before, after = initializers(path), initializers(out)
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in after.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in before.items()
    }


def test_weights_inside_nodes_move_too(tmp_path: Path) -> None:
    """onnx can store the tensor of a Constant node in a data file."""
    constant = helper.make_node("Constant", [], ["w"], "c", value=numpy_helper.from_array(W, "w"))
    path = write(
        tmp_path / "in.onnx",
        [constant, helper.make_node("MatMul", ["x", "w"], ["y"])],
        [info("x", [4, 64])],
        [info("y", [4, 128])],
    )
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "out.onnx"
    succeed("cleanup", path, out)
    path.unlink()
    (tmp_path / "weights.bin").unlink()
    x = normal(4, 64, seed=1)
    assert np.allclose(Session(out)({"x": x})["y"], x @ W, atol=1e-4)


def test_a_large_model_in_memory_gets_no_data_file(tmp_path: Path) -> None:
    """Weights that lay in the graph file stay there."""
    succeed("convert", linear(tmp_path / "in.onnx", normal(1000, 1000)), tmp_path / "out.onnx")
    assert names(tmp_path) == ["in.onnx", "out.onnx"]


# --- over what is there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True], ids=["inline", "external"])
def test_the_output_is_the_input_with_force_alone(outside: bool, tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    if outside:
        external(path)
    before = path.read_bytes()
    assert "--force" in refuse("prune", path, path, code=2) and path.read_bytes() == before
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert "--force" in refuse("prune", path, link, code=2)
    succeed("prune", path, path, "--force")
    assert np.count_nonzero(initializers(path)["w"]) == W.size // 2
    succeed("convert", path, path, "--force")
    assert np.count_nonzero(initializers(path)["w"]) == W.size // 2


def test_an_own_data_file_is_replaced_not_overwritten(tmp_path: Path) -> None:
    """The old data file goes when nothing refers to it any more; two runs leave one file."""
    path = external(linear(tmp_path / "in.onnx"))
    for _ in range(3):
        succeed("prune", path, tmp_path / "out.onnx")
        assert len([n for n in names(tmp_path) if n.startswith("out.onnx.")]) == 1
        assert np.count_nonzero(initializers(tmp_path / "out.onnx")["w"]) == W.size // 2


def test_two_graphs_share_a_data_file_and_one_is_rewritten(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    succeed("prune", path, tmp_path / "a.onnx")
    succeed("convert", tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert locations(tmp_path / "a.onnx") == locations(tmp_path / "b.onnx") == {"a.onnx.data"}
    pruned = initializers(tmp_path / "b.onnx")["w"]
    succeed("convert", linear(tmp_path / "new.onnx", normal(8, 8)), tmp_path / "a.onnx")
    assert np.array_equal(initializers(tmp_path / "b.onnx")["w"], pruned)
    assert np.array_equal(initializers(tmp_path / "a.onnx")["w"], normal(8, 8))


@pytest.mark.parametrize("name", ["m [1].onnx", "ключ ü.onnx", "a b.onnx", "x.y.onnx", "-m.onnx"])
def test_unusual_names(name: str, tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    for _ in range(2):
        succeed("prune", path, tmp_path / name)
    assert np.count_nonzero(initializers(tmp_path / name)["w"]) == W.size // 2
    assert len(names(tmp_path)) == 4


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    """Root may write everywhere, so the folder is a file system without room for names: /proc."""
    path = external(linear(tmp_path / "in.onnx"))
    message = refuse("convert", path, Path("/proc/out.onnx"))
    assert "/proc/out.onnx" in message and "cannot be written" in message


def test_a_missing_folder_is_made_and_goes_where_nothing_is_written(tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    succeed("convert", path, tmp_path / "new" / "deep" / "out.onnx")
    assert names(tmp_path / "new" / "deep") == ["out.onnx"]
    refuse("set-opset", path, tmp_path / "never" / "out.onnx", "--ir-version", "3", "--version", "20", code=2)
    assert names(tmp_path) == ["in.onnx", "new"]


def test_an_output_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").mkdir()
    assert "is a folder" in refuse("convert", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert not names(tmp_path / "out.onnx")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("outside", [False, True], ids=["graph too large", "data too large"])
def test_a_full_disk_leaves_nothing(outside: bool, small_disk: Path, tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx", normal(1000, 1000))
    if outside:
        external(path)
    message = refuse("convert", path, small_disk / "out.onnx")
    assert "No space left" in message and "out.onnx" in message
    assert names(small_disk) == []


def test_a_full_disk_keeps_the_old_output(small_disk: Path, tmp_path: Path) -> None:
    succeed("convert", external(linear(tmp_path / "small.onnx")), small_disk / "out.onnx")
    before = {n: (small_disk / n).read_bytes() for n in names(small_disk)}
    refuse("prune", external(linear(tmp_path / "in.onnx", normal(1000, 1000)), "big.bin"), small_disk / "out.onnx")
    assert {n: (small_disk / n).read_bytes() for n in names(small_disk)} == before


def test_a_data_file_that_shrinks_before_it_is_read(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx", normal(1000, 1000)))
    model = Model.load(path)
    (tmp_path / "other").mkdir()
    os.truncate(tmp_path / "weights.bin", 1000)
    with pytest.raises(Exception, match="early"):
        model.save(tmp_path / "other" / "out.onnx")
    assert names(tmp_path / "other") == []


# --- killed -----------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
moment, folder = int(sys.argv[1]), sys.argv[2]
seen = 0
def hook(event, args):
    global seen
    if event in ("open", "os.rename", "os.remove", "os.truncate") and any(
            folder in os.fsdecode(a) for a in args if isinstance(a, (str, bytes, os.PathLike))
        ):
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
from onnxtools.cli.main import main
sys.addaudithook(hook)
main(sys.argv[3:])
"""


def complete(path: Path) -> Array:
    """The weight of the model at `path`; fails where a data file is missing, short or half written."""
    onnx.checker.check_model(str(path))
    return initializers(path)["w"]


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    """SIGKILL just before the 1st, 2nd, 3rd ... open, rename, removal in the output folder, until the run gets
    through.
    """
    old, new = normal(100, 128, seed=1), normal(200, 128, seed=2)  # of different shapes, so that a mixture is neither
    source = external(linear(tmp_path / "in.onnx", new))
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "out.onnx"
    outcomes = []
    for moment in range(1, 60):
        for path in folder.iterdir():
            path.unlink()
        Model.load(external(linear(tmp_path / "old.onnx", old), "old.bin")).save(target)
        done = subprocess.run(
            [sys.executable, "-c", KILLED_AT, str(moment), str(folder), "cleanup", str(source), str(target)],
            cwd=ROOT,
            check=False,
            capture_output=True,
        )
        found = complete(target)
        assert np.array_equal(found, old) or np.array_equal(found, new), moment
        outcomes.append(np.array_equal(found, new))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.returncode == 0 and len(outcomes) > 4
    assert outcomes[0] is False and outcomes[-1] is True
    assert outcomes == sorted(outcomes), "once the new one is there it stays"


def test_killed_in_the_middle_of_a_big_save(tmp_path: Path) -> None:
    """SIGKILL at several moments of a copy of 200 MB; then the next run cleans up what was left."""
    old = normal(8, 8)
    source = tmp_path / "in.onnx"
    big_model(source, tmp_path / "weights.bin", count=3)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "out.onnx"
    Model.load(external(linear(tmp_path / "old.onnx", old), "old.bin")).save(target)
    command = [
        sys.executable,
        "-c",
        "import sys; from onnxtools.cli.main import main; main(sys.argv[1:])",
        "prune",
        str(source),
        str(target),
    ]
    middle = 0
    for pause in (0, 0.03, 0.1, 0.2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not [n for n in names(folder) if n.endswith(".tmp")]:
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        middle += process.wait() == -signal.SIGKILL
        onnx.checker.check_model(str(target))
        found = initializers(target)  # reads every data file: a short one fails here
        assert set(found) == {"w0", "w1", "w2", "s"} or np.array_equal(found["w"], old)
    assert middle
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    onnx.checker.check_model(str(target))
    assert set(names(folder)) == {"out.onnx", *locations(target)}


# --- memory -----------------------------------------------------------------------------------------------------------

SIZE = 4096
PEAK = """
import sys
from onnxtools.cli.main import main
try:
    main(sys.argv[1:])
finally:
    # getrusage would count the parent's pages.
    hwm = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", hwm.split()[1], file=sys.stderr)
"""


def big_model(path: Path, data: Path, count: int = 16, quantized: bool = False) -> Path:
    """`count` weights of 64 MB in one data file with holes: it takes no room until it is copied."""
    nodes, tensors = [], []
    for index in range(count):
        tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
        tensor.raw_data = b""
        set_external_data(tensor, data.name, offset=index * SIZE * SIZE * 4, length=SIZE * SIZE * 4)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensors.append(tensor)
        weight = f"w{index}"
        if quantized:
            nodes.append(
                helper.make_node("TRT_FP8QuantizeLinear", [weight, "s"], [f"q{index}"], f"q{index}", domain="trt")
            )
            nodes.append(
                helper.make_node(
                    "TRT_FP8DequantizeLinear", [f"q{index}", "s"], [f"d{index}"], f"dq{index}", domain="trt"
                )
            )
            weight = f"d{index}"
        nodes.append(
            helper.make_node(
                "MatMul",
                [f"h{index}" if index else "x", weight],
                [f"h{index + 1}" if index + 1 < count else "y"],
                f"mm{index}",
            )
        )
    with open(data, "wb") as file:
        file.truncate(count * SIZE * SIZE * 4)
    return write(
        path,
        nodes,
        [info("x", [1, SIZE])],
        [info("y", [1, SIZE])],
        [*tensors, *stored(s=np.float32(0.5))],
        domains=["trt"],
    )


@pytest.mark.parametrize(
    ("command", "quantized", "elsewhere"),
    [("convert", False, False), ("convert", False, True), ("convert", True, False), ("prune", False, False)],
    ids=["convert by reference", "convert and copy", "convert and fold", "prune"],
)  # fmt: skip
def test_a_gigabyte_passes_through_200_megabytes(
    command: str, quantized: bool, elsewhere: bool, tmp_path: Path
) -> None:
    path = big_model(tmp_path / "in.onnx", tmp_path / "weights.bin", quantized=quantized)
    (tmp_path / "other").mkdir()
    out = (tmp_path / "other" if elsewhere else tmp_path) / "out.onnx"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, command, str(path), str(out), "--no-check"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stderr.split("peak")[1]) / 1024 < 200
    written = sum(p.stat().st_size for p in out.parent.glob("out.onnx.*"))
    assert (
        written
        == {
            "convert": SIZE * SIZE * 16 if quantized else (SIZE * SIZE * 64 if elsewhere else 0),
            "prune": SIZE * SIZE * 64,
        }[command]
    )
    for leftover in tmp_path.rglob("*.data"):
        leftover.unlink()


def test_nothing_is_on_stderr_of_a_good_run(tmp_path: Path) -> None:
    assert run("convert", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx").err == ""


def test_computed_weights_begin_at_a_page(tmp_path: Path) -> None:
    """So that runtimes map them and file systems share them."""
    out = tmp_path / "o.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="one"),
        helper.make_node("MatMul", ["h", "b"], ["y"], name="two"),
    ]
    write(
        tmp_path / "in.onnx",
        nodes,
        [info("x", [4, 60])],
        [info("y", [4, 128])],
        stored(a=normal(60, 100), b=normal(100, 128)),
    )
    succeed("prune", external(tmp_path / "in.onnx"), out, "--no-check")
    placed = [(int(t.offset or 0), t.nbytes) for t in Model.load(out).external_tensors()]
    assert len(placed) == 2 and all(offset % 4096 == 0 for offset, _ in placed)
