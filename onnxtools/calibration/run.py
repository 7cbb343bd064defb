"""The calibration run: segment after segment, with all texts through each. Values between segments are on disk.

Memory: one segment's weights in float32, one text's activations in it, and the statistics of the observers. Values
between segments are files, one for each value and text. The files of finished segments are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import analyse
from onnxtools.base.errors import JobError
from onnxtools.base.progress import counted
from onnxtools.base.version import __version__
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.calibration.data import read_samples
from onnxtools.calibration.segments import Segment, segments
from onnxtools.calibration.session import SegmentSession
from onnxtools.calibration.statistics import Observer
from onnxtools.ir.model import Model, file_stamps
from onnxtools.storage.files import OwnFolder, replacing
from onnxtools.storage.rows import RowTensor, Scratch, read_rows

_LOG = logging.getLogger("onnxtools")
Array = np.ndarray[Any, Any]
Findings = dict[str, Array]


def file_name(name: str) -> str:
    """Returns a file name for the value called `name`: 32 hexadecimal digits of its SHA-256.

    Names of values may have slashes, differ in little and be long.
    """
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class _Spool:
    """The values between segments: one .npy file for each value and text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, value: ir.Value, text: int) -> Path:
        return self._folder / file_name(value.name or "") / f"{text}.npy"

    def put(self, value: ir.Value, text: int, array: Array) -> None:
        path = self._path(value, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)

    def get(self, value: ir.Value, text: int) -> Array:
        return np.load(self._path(value, text))  # type: ignore[no-any-return]

    def keep_only(self, values: Sequence[ir.Value]) -> None:
        names = {file_name(value.name or "") for value in values}
        for folder in self._folder.iterdir() if self._folder.exists() else ():
            if folder.name not in names:
                shutil.rmtree(folder)


class StoredWeight(RowTensor):
    """A weight in a file of the calibration run, as `Calibration.store` writes it.

    Args:
        path: the .npy file. It is mapped into memory.
        dtype: element type of the weight.
        name: name of the weight.
        owner: keeps the file's temporary folder alive as long as this tensor.
    """

    __slots__ = ("_array", "_owner")

    def __init__(self, path: Path, dtype: ir.DataType, name: str, owner: object) -> None:
        self._array = np.load(path, mmap_mode="r")
        self._owner = owner  # a temporary folder is removed when nothing refers to it any more
        super().__init__(self._array.shape, dtype, name)

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> Array:
        """Returns a copy of the rows `start:stop` in the weight's type. `scratch` is not used."""
        kind, rows = self.dtype.numpy(), np.array(self._array[start:stop])
        return rows.astype(kind) if self.dtype == ir.DataType.INT4 else rows.view(kind)


_SAMPLED_ROWS = 8
"""Rows of a computed weight that `fingerprint` reads at each place."""
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def fingerprint(model: Model) -> str:
    """Returns the SHA-256, in hexadecimal, of the model in memory, which a pass may have changed.

    It covers the nodes with their attributes, the names, types and shapes of the weights, and the elements of weights
    that are not in a file. Of a weight that is computed while it is read, it covers the first and the middle rows: the
    pass computes every row in the same way.
    """
    digest = hashlib.sha256()
    for node in (
        *model.graph.all_nodes(),
        *(node for function in model.ir.functions.values() for node in function.all_nodes()),
    ):
        plain = [
            a.ref_attr_name or ir.serde.serialize_attribute(a).SerializeToString()
            for a in node.attributes.values()
            if a.type not in _GRAPHS
        ]
        digest.update(
            repr(
                (node.name, node.domain, node.op_type, [v.name if v is not None else "" for v in node.inputs], plain)
            ).encode()
        )
    for value, tensor in model.weights():
        digest.update(repr((value.name, tensor.dtype, tuple(tensor.shape.numpy()))).encode())
        if isinstance(tensor, ir.ExternalTensor) or not tensor.size or tensor.dtype == ir.DataType.STRING:
            continue
        if not isinstance(tensor, RowTensor):
            digest.update(tensor.tobytes())
            continue
        rows = int(tensor.shape.numpy()[0]) if len(tensor.shape) else 1
        step = tensor.row_multiple
        for start in sorted({0, rows // 2 // step * step}):
            sample = read_rows(tensor, start, min(start + -(-_SAMPLED_ROWS // step) * step, rows))
            digest.update(np.ascontiguousarray(sample).view(np.uint8).tobytes())
    return digest.hexdigest()


class Layer:
    """The segment that is being calibrated.

    Attributes:
        segment: the segment.
        products: its products with a stored weight.
    """

    def __init__(self, calibration: Calibration, segment: Segment) -> None:
        self.segment, self.products = segment, segment.products
        self._calibration = calibration
        self._ran = False

    def observe(self, observers: Mapping[ir.Value, Sequence[Observer]]) -> None:
        """Run all texts through the segment and pass each value to its observers.

        Observers get float32 [tokens, channels]. A value of rank 4 keeps its shape.

        Raises:
            JobError: ONNX Runtime failed, or a value is infinite or NaN.
        """
        self._calibration.through(self.segment, observers)
        self._ran = True

    def run_again(self) -> None:
        """Run all texts again with the current weights, so that later segments get the changed values."""
        self._calibration.through(self.segment, {})

    def finish(self) -> None:
        """Run all texts if `observe` has not, so that later segments get their values."""
        if not self._ran:
            self._calibration.through(self.segment, {})


class Calibration:
    """The calibration texts, and the folder for the values between segments. Use it as a context manager.

    Args:
        model: the model; a note on the texts is added to it.
        options: the pass whose calibration data and cache are used.
        key: anything else on which the findings depend. A cache of another key is not used.

    Raises:
        UsageError, JobError: as in `read_samples` and `segments`.
    """

    def __init__(self, model: Model, options: Calibrated, key: str = "") -> None:
        self.model, self.samples = model, read_samples(model, options)
        self.segments = segments(model)
        self._facts = analyse(model)
        self.tokens = sum(_count(feeds) for feeds in self.samples)
        self._label = options.name
        few = (
            f", fewer than --calib-size {options.calib_size}"
            if len(self.samples) < options.calib_size and not str(options.calib).endswith(".npz")
            else ""
        )
        model.notes.append(
            f"{'warning: ' if few else ''}calibrated on {len(self.samples)} texts, {self.tokens} tokens{few}"
        )
        self._cache = Path(options.calib_cache) if options.calib_cache else None
        self._key = {
            "graph": model.sha256,
            "data": self.samples.digest,
            "key": key,
            "model": fingerprint(model),
            "weights": file_stamps(model.path) if model.path else None,
            "version": __version__,
        }

    def __enter__(self) -> Calibration:
        self._temporary: OwnFolder | None = None
        if self._cache is None:
            self._temporary = OwnFolder("onnxtools-calibration-")
            self._folder = self._temporary.path
        else:
            self._folder = self._cache
            self._open_cache()
        self._spool = _Spool(self._folder / "values")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._cache is not None:
            return  # a later run resumes here
        shutil.rmtree(self._folder / "values", ignore_errors=True)

    def _open_cache(self) -> None:
        note = self._folder / "calibration.json"
        if self._folder.exists() and any(self._folder.iterdir()):
            strangers = [
                entry.name
                for entry in self._folder.iterdir()
                if not re.fullmatch(r"calibration\.json|\d{4}\.npz|values|weights", entry.name)
            ]
            if strangers or not note.is_file():
                raise JobError(
                    f"{self._folder}: holds other files ({strangers[0] if strangers else 'no calibration.json'}); name "
                    "an empty folder with --calib-cache"
                )
            try:
                recorded = json.loads(note.read_text())
            except ValueError:
                recorded = None
            if recorded == self._key:
                return
            if not isinstance(recorded, dict) or set(recorded) != set(self._key):
                raise JobError(
                    f"{note}: is no note of a calibration, or damaged; name an empty folder with --calib-cache, or "
                    "remove this one"
                )
            _LOG.info("%s: is of another model or of other options; begun anew", self._folder)
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(note) as tmp:
            tmp.write_text(json.dumps(self._key))

    def findings(
        self, look: Callable[[Layer], Findings], nodes: Collection[ir.Node] | None = None
    ) -> Iterator[tuple[Segment, Findings]]:
        """Yields the segments in order, each with the findings of `look`.

        Findings in the cache are read, and `look` is not called for them.

        Args:
            look: returns the findings of a layer, arrays by name. It may call `Layer.observe` and `run_again`. Its
                arrays must be small.
            nodes: the nodes that `look` needs; segments after the last of them are left out. None means all segments.

        Raises:
            JobError: the cache is damaged, or a run failed.
        """
        numbers = [
            n
            for n, segment in enumerate(self.segments, 1)
            if nodes is None or any(node in nodes for node in segment.nodes)
        ]
        count = max(numbers, default=0)
        with counted(f"{self._label}: calibration", count * len(self.samples)) as self._tick:
            for number, segment in enumerate(self.segments[:count]):
                path = self._folder / f"{number:04}.npz"
                _LOG.info("%s: calibration, segment %d of %d", self._label, number + 1, count)
                if path.is_file():
                    findings = self._read_findings(path)
                    self._tick(len(self.samples))
                else:
                    layer = Layer(self, segment)
                    findings = look(layer)
                    layer.finish()
                    with replacing(path) as tmp, open(tmp, "wb") as file:
                        np.savez(file, **findings)  # type: ignore[arg-type]
                    self._spool.keep_only(segment.kept)
                yield segment, findings

    def _read_findings(self, path: Path) -> Findings:
        try:
            with np.load(path) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise JobError(
                f"{path}: this part of the calibration cache is damaged ({error}); remove the folder "
                f"{str(self._folder)!r}"
            ) from None

    def store(self, weight: str, array: Array) -> None:
        """Write the computed elements of the weight of that name to disk."""
        path = self._folder / "weights" / f"{file_name(weight)}.npy"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as tmp, open(tmp, "wb") as file:
            np.save(file, _plain(array))

    def stored(self, weight: str, dtype: ir.DataType) -> StoredWeight:
        """Returns the weight that `store` wrote, mapped from its file. The file lives as long as the tensor.

        Args:
            weight: name of the weight.
            dtype: element type of the stored array.

        Raises:
            JobError: the file is missing.
        """
        path = self._folder / "weights" / f"{file_name(weight)}.npy"
        if not path.is_file():
            raise JobError(f"{path}: is missing from the calibration cache; remove the folder {str(self._folder)!r}")
        return StoredWeight(path, dtype, weight, self._temporary)

    def is_float(self, value: ir.Value) -> bool:
        """Whether `value` holds floating-point numbers, as far as the graph says."""
        dtype = self._facts[value].dtype
        return dtype is not None and dtype.is_floating_point()

    def through(self, segment: Segment, observers: Mapping[ir.Value, Sequence[Observer]]) -> None:
        """Run all texts through `segment`: store its values for later segments, and pass others to the observers.

        Args:
            segment: the segment to run.
            observers: by value; the values are outputs or inputs of the segment's nodes.

        Raises:
            JobError: ONNX Runtime failed, or an observed value is infinite or NaN.
        """
        inner = {value for node in segment.nodes for value in node.outputs}
        outputs = [value for value in dict.fromkeys([*segment.kept, *observers]) if value in inner]
        if not outputs and not observers:
            self._tick(len(self.samples))
            return
        session: SegmentSession | None = None
        for text, feeds in enumerate(self.samples):
            received = {value: self._spool.get(value, text) for value in segment.received}
            if session is None and outputs:
                types = {value: ir.DataType.from_numpy(array.dtype).value for value, array in received.items()}
                session = SegmentSession(self.model, segment, types, outputs)
            results = (
                {}
                if session is None
                else session(feeds, {value.name or "": array for value, array in received.items()})
            )
            for value in segment.kept:
                if value in results:
                    self._spool.put(value, text, results[value])
            for value, several in observers.items():
                infinite = all(getattr(observer, "takes_infinity", False) for observer in several)
                array = _rows(results.get(value, received.get(value, feeds.get(value.name or ""))), value, infinite)
                for observer in several if array.size else ():  # no token of this text chose the expert
                    observer.add(array)
            self._tick()


def _plain(array: Array) -> Array:
    """Returns `array` in a type that numpy's file format knows: int4 as int8, other foreign types as their bits."""
    if array.dtype == ir.DataType.INT4.numpy():
        return array.astype(np.int8)
    return array if array.dtype.isbuiltin else array.view(f"u{array.dtype.itemsize}")


def _rows(array: Array | None, value: ir.Value, infinite: bool) -> Array:
    """Returns activations as float32 [tokens, channels]; an array of rank 4 (keys and values) keeps its shape.

    Raises:
        JobError: an element is NaN, or infinite where that is not `infinite`.
    """
    assert array is not None, value.name
    array = array.astype(np.float32, copy=False)
    if np.isnan(array).any() or not (infinite or np.isfinite(array).all()):
        raise JobError(
            f"value {value.name!r} is infinite or NaN while calibrating; look for damaged weights before it with "
            "`onnxtools validate`"
        )
    return array if array.ndim == 4 else array.reshape(-1, array.shape[-1] if array.ndim else 1)


def _count(feeds: Mapping[str, Array]) -> int:
    """Returns the number of tokens of a text.

    This is the size of the first integer input of rank 2. Without one it is the size of the first input without its
    last axis.
    """
    arrays = list(feeds.values())
    first = next((a for a in arrays if a.ndim == 2 and a.dtype.kind == "i"), None)
    return int(first.size) if first is not None else int(np.prod(arrays[0].shape[:-1]))
