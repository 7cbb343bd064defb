"""Writes inputs and outputs as Polygraphy's JSON, so that `polygraphy run` can compare an engine with our results.

polygraphy run gpt.engine --trt --load-inputs in.json --load-outputs out.json
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onnxtools.base.errors import JobError, UsageError
from onnxtools.storage.files import refuse_special, replacing

if TYPE_CHECKING:
    from onnxtools.check.feeds import Array, Feeds

RUNNER = "onnxtools-onnxruntime"
"""The runner's name in the file of outputs."""


def check_place(path: Path | None, *others: Path | None) -> None:
    """Refuse, before any work, a place that holds anything but data of Polygraphy.

    Args:
        others: other files of the command.

    Raises:
        UsageError: it is one of `others`, or does not end in .json.
        JobError: a file of another kind is there.
    """
    if path is None:
        return
    if path.suffix != ".json":
        raise UsageError(f"{path}: does not end in .json; name a JSON file for Polygraphy's data")
    if any(other is not None and path.absolute() == other.absolute() for other in others):
        raise UsageError(f"{path}: is named twice; name another file")
    refuse_special(path)
    if path.is_dir():
        raise JobError(f"{path}: is a folder; name a file")
    if path.exists() and b"polygraphy_class" not in path.read_bytes():
        raise JobError(f"{path}: is there and holds no data of Polygraphy; name another file")


@contextmanager
def _silent() -> Iterator[None]:
    """Polygraphy tells what it saves on stdout."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield


def save_inputs(path: Path, feeds: Feeds) -> None:
    """Write the file for `polygraphy run --load-inputs`: a list with one mapping of names to arrays.

    Raises:
        OSError: the file cannot be written.
    """
    from polygraphy.json import save_json

    with replacing(path) as tmp, _silent():
        save_json([dict(feeds)], str(tmp), description="input data")


def save_outputs(path: Path, outputs: Mapping[str, Array]) -> None:
    """Write the file for `polygraphy run --load-outputs`: the results of one run, arrays by name.

    Raises:
        OSError: the file cannot be written.
    """
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add([dict(outputs)], runner_name=RUNNER)
    with replacing(path) as tmp, _silent():
        results.save(str(tmp))
