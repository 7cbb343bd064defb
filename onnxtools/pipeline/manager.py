"""`PassManager`: runs passes in order; everything else it does is an instrument hung on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from onnxtools.base.errors import ModelError, OnnxtoolsError
from onnxtools.base.version import __version__
from onnxtools.ir.model import Model
from onnxtools.ir.provenance import PROVENANCE_KEY, provenance
from onnxtools.ir.wellformed import fault
from onnxtools.pipeline.partition import Partition, partitioned
from onnxtools.pipeline.passbase import Configured, Pass, PassResult

_LOG = logging.getLogger("onnxtools")


@dataclass
class Step:
    """One executed pass: its result and what the instruments measured (flat `key: value`)."""

    name: str
    options: dict[str, Any]
    result: PassResult
    measures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """All steps of one run, in order, and what a partition at their end made."""

    steps: list[Step] = field(default_factory=list)
    ranks: list[Model] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        return any(step.result.changed for step in self.steps)

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(step) for step in self.steps]


class Instrument:
    """Watches a run. Subclass what is needed; an exception in `after` fails the run."""

    def before(self, pass_: Pass, model: Model) -> None:
        """Called before `pass_` runs."""

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        """Called after `pass_` has run; put what you measured into `step.measures`."""

    def finished(self, model: Model) -> None:
        """Called once, after the last pass; an exception here fails the run too."""

    def partitioned(self, partition: Partition, model: Model, ranks: Sequence[Model], step: Step) -> None:
        """Called when `partition` has made `ranks` of `model`; an exception here fails the run."""

    def failed(self, pass_: Pass, model: Model, error: BaseException) -> None:
        """Called when `pass_` raised."""


class PassManager:
    """Runs `passes` (composites expanded) over a model, instruments around each; then `partition`, if there is one."""

    def __init__(
        self, passes: Sequence[Pass], instruments: Sequence[Instrument] = (), partition: Partition | None = None
    ) -> None:
        self.partition = partition
        self.passes = [inner for outer in passes for inner in outer.expand()]
        self.requested = list(passes)
        self.instruments = list(instruments)

    def run(self, model: Model) -> Report:
        """Change `model` in place and record the provenance in its metadata; a partition's ranks are in the report.

        Raises:
            OnnxtoolsError: whatever a pass or an instrument refused.
        """
        report = Report()
        model.lift_constants()  # of a model that was made in memory
        for pass_ in self.passes:
            for instrument in self.instruments:
                instrument.before(pass_, model)
            try:
                _LOG.info("%s: %s", pass_.name, model.path or "a model in memory")
                pass_.requires(model)
                result = pass_.apply(model)
                pass_.ensures(model)
                _LOG.debug("%s: %d matches; %s", pass_.name, result.matches, "; ".join(result.notes))
                step = Step(pass_.name, pass_.options(), result)
                for instrument in reversed(self.instruments):
                    instrument.after(pass_, model, step)
            except Exception as error:
                _blame_the_file(model, error)
                for instrument in self.instruments:
                    instrument.failed(pass_, model, error)
                raise
            report.steps.append(step)
        for instrument in self.instruments:
            instrument.finished(model)
        record_provenance(model, self.requested)
        if self.partition is not None:
            self._partition(self.partition, model, report)
        return report

    def _partition(self, partition: Partition, model: Model, report: Report) -> None:
        _LOG.info("%s: %s", partition.name, model.path or "a model in memory")
        report.ranks = partitioned(partition, model)
        result = PassResult(True, len(report.ranks), [f"{len(report.ranks)} ranks"])
        step = Step(partition.name, partition.options(), result)
        for instrument in self.instruments:
            instrument.partitioned(partition, model, report.ranks, step)
        report.steps.append(step)
        for rank in report.ranks:
            record_provenance(rank, [partition])


def _blame_the_file(model: Model, error: Exception) -> None:
    """Say so where an unexpected exception comes of a file that is no valid model.

    Raises:
        ModelError: it is none.
    """
    why = (
        fault(model.path)
        if model.path is not None
        and model.path.is_file()
        and not isinstance(error, (OnnxtoolsError, OSError, MemoryError))
        else ""
    )
    if why:
        raise ModelError(f"{model.path}: is no valid ONNX model ({why}); export it again") from error


def record_provenance(model: Model, passes: Sequence[Configured]) -> None:
    """Append to `metadata_props['onnxtools.provenance']` (a JSON list): input hash, passes with options, versions."""
    import numpy
    import onnx
    import onnx_ir

    props = model.ir.metadata_props
    history = provenance(model)
    versions = {
        "onnxtools": __version__,
        "onnx": onnx.__version__,
        "onnx_ir": onnx_ir.__version__,
        "numpy": numpy.__version__,
    }
    entry = {
        "input": model.path.name if model.path else None,
        "input_sha256": model.sha256,
        "passes": [{"pass": p.name, **p.public_options()} for p in passes],
        "versions": versions,
    }
    props[PROVENANCE_KEY] = json.dumps([*history, entry])
