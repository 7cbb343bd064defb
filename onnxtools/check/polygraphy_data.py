"""Writes inputs and outputs as Polygraphy's JSON, so that `polygraphy run` can compare an engine with our results.

polygraphy run gpt.engine --trt --load-inputs in.json --load-outputs out.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnxtools.check.feeds import Array, Feeds
from onnxtools.storage.files import replacing

RUNNER = "onnxtools-onnxruntime"
"""The runner's name in the file of outputs."""


def save_inputs(path: Path, feeds: Feeds) -> None:
    """Write the file for `polygraphy run --load-inputs`: a list with one mapping of names to arrays.

    Raises:
        OSError: the file cannot be written.
    """
    from polygraphy.json import save_json

    with replacing(path) as tmp:
        save_json([dict(feeds)], str(tmp), description="input data")


def save_outputs(path: Path, outputs: Mapping[str, Array]) -> None:
    """Write the file for `polygraphy run --load-outputs`: the results of one run, arrays by name.

    Raises:
        OSError: the file cannot be written.
    """
    from polygraphy.comparator import RunResults

    results = RunResults()
    results.add([dict(outputs)], runner_name=RUNNER)
    with replacing(path) as tmp:
        results.save(str(tmp))
