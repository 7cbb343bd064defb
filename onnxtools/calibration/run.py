"""The calibration run: segment after segment, all texts through each, what flows between them on the disk.

Memory: one segment's weights in float32, one text's activations in it, and what the observers keep. The values that are
handed on lie in files, one for each text; those of finished segments are removed.
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
    """A file's name for the value called `name`: names may hold slashes, differ in little and be long."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


class _Spool:
    """Values between segments: one file for each value and text."""

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
    """A weight in a file of the calibration."""

    __slots__ = ("_array", "_owner")

    def __init__(self, path: Path, dtype: ir.DataType, name: str, owner: object) -> None:
        self._array = np.load(path, mmap_mode="r")
        self._owner = owner  # a temporary folder goes when nothing refers to it any more
        super().__init__(self._array.shape, dtype, name)

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> Array:
        kind, rows = self.dtype.numpy(), np.array(self._array[start:stop])
        return rows.astype(kind) if self.dtype == ir.DataType.INT4 else rows.view(kind)


_SAMPLED_ROWS = 8
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def fingerprint(model: Model) -> str:
    """Of the model as it is in memory, which a pass may have changed: nodes with their attributes, and each weight that
    is not in a file.

    Of a weight that is computed while it is read, the first and middle rows: its recipe is the pass's, whatever the
    row.
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
    """A segment whose turn it is."""

    def __init__(self, calibration: Calibration, segment: Segment) -> None:
        self.segment, self.products = segment, segment.products
        self._calibration = calibration
        self._ran = False

    def observe(self, observers: Mapping[ir.Value, Sequence[Observer]]) -> None:
        """Run all texts through the segment; each observer sees its value, as float32 [tokens, channels] or as it is
        where the rank is not 2 or 3.
        """
        self._calibration.through(self.segment, observers)
        self._ran = True

    def run_again(self) -> None:
        """Run all texts with the weights as they are now, so that later segments see what changed."""
        self._calibration.through(self.segment, {})

    def finish(self) -> None:
        if not self._ran:
            self._calibration.through(self.segment, {})


class Calibration:
    """Texts and a place for what flows between segments. Use as a context manager.

    Args:
        options: whose calibration data and cache are used.
        key: what else the findings depend on; a cache of another key is not used.
    Raises:
        UsageError, JobError: as `read_samples` and `segments`.
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
            return  # a later run goes on from here
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
                known = json.loads(note.read_text())
            except ValueError:
                known = None
            if known == self._key:
                return
            if not isinstance(known, dict) or set(known) != set(self._key):
                raise JobError(
                    f"{note}: is no note of a calibration, or damaged; name an empty folder with --calib-cache, or "
                    "remove this one"
                )
            shutil.rmtree(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(note) as tmp:
            tmp.write_text(json.dumps(self._key))

    def findings(
        self, look: Callable[[Layer], Findings], nodes: Collection[ir.Node] | None = None
    ) -> Iterator[tuple[Segment, Findings]]:
        """What `look` finds at each segment, in order; findings that the cache has are not looked for again.

        `look` may call `Layer.observe` and `run_again`; its arrays must be small.

        Args:
            nodes: what `look` looks at; segments behind the last of them are left out. None: all.
        Raises:
            JobError: the cache is damaged.
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
                    found = self._cached(path)
                    self._tick(len(self.samples))
                else:
                    layer = Layer(self, segment)
                    found = look(layer)
                    layer.finish()
                    with replacing(path) as tmp, open(tmp, "wb") as file:
                        np.savez(file, **found)  # type: ignore[arg-type]
                    self._spool.keep_only(segment.kept)
                yield segment, found

    def _cached(self, path: Path) -> Findings:
        try:
            with np.load(path) as archive:
                return {name: archive[name] for name in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise JobError(
                f"{path}: this part of the calibration cache is damaged ({error}); remove the folder "
                f"{str(self._folder)!r}"
            ) from None

    def store(self, weight: str, array: Array) -> None:
        """Keep the computed elements of the weight of that name on the disk."""
        path = self._folder / "weights" / f"{file_name(weight)}.npy"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as tmp, open(tmp, "wb") as file:
            np.save(file, _plain(array))

    def stored(self, weight: str, dtype: ir.DataType) -> StoredWeight:
        """What `store` was given, which need not be in memory; its file lives as long as it."""
        path = self._folder / "weights" / f"{file_name(weight)}.npy"
        if not path.is_file():
            raise JobError(f"{path}: is missing from the calibration cache; remove the folder {str(self._folder)!r}")
        return StoredWeight(path, dtype, weight, self._temporary)

    def is_float(self, value: ir.Value) -> bool:
        """Whether `value` holds floating-point numbers, as far as the graph says."""
        dtype = self._facts[value].dtype
        return dtype is not None and dtype.is_floating_point()

    def through(self, segment: Segment, observers: Mapping[ir.Value, Sequence[Observer]]) -> None:
        """All texts through `segment`: what it makes for later ones is spooled, observers see theirs."""
        inner = {value for node in segment.nodes for value in node.outputs}
        wanted = [value for value in dict.fromkeys([*segment.kept, *observers]) if value in inner]
        if not wanted and not observers:
            self._tick(len(self.samples))
            return
        session: SegmentSession | None = None
        for text, feeds in enumerate(self.samples):
            received = {value: self._spool.get(value, text) for value in segment.received}
            if session is None and wanted:
                types = {value: ir.DataType.from_numpy(array.dtype).value for value, array in received.items()}
                session = SegmentSession(self.model, segment, types, wanted)
            found = (
                {}
                if session is None
                else session(feeds, {value.name or "": array for value, array in received.items()})
            )
            for value in segment.kept:
                if value in found:
                    self._spool.put(value, text, found[value])
            for value, several in observers.items():
                array = _rows(found.get(value, received.get(value, feeds.get(value.name or ""))), value)
                for observer in several:
                    observer.add(array)
            self._tick()


def _plain(array: Array) -> Array:
    """As a type that numpy's file format knows."""
    if array.dtype == ir.DataType.INT4.numpy():
        return array.astype(np.int8)
    return array if array.dtype.isbuiltin else array.view(f"u{array.dtype.itemsize}")


def _rows(array: Array | None, value: ir.Value) -> Array:
    """[tokens, channels] of activations; keys and values [batch, heads, sequence, head_dim] stay."""
    assert array is not None, value.name
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise JobError(
            f"value {value.name!r} is infinite or NaN while calibrating; look for damaged weights before it with "
            "`onnxtools validate`"
        )
    return array if array.ndim == 4 else array.reshape(-1, array.shape[-1])


def _count(feeds: Mapping[str, Array]) -> int:
    """Tokens of a text: elements of the first integer input of rank 2, else of the first axes of the first input."""
    arrays = list(feeds.values())
    first = next((a for a in arrays if a.ndim == 2 and a.dtype.kind == "i"), None)
    return int(first.size) if first is not None else int(np.prod(arrays[0].shape[:-1]))
