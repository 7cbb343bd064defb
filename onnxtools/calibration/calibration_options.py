"""`Calibrated`: the options of every pass that calibrates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.pipeline.passbase import Pass


@dataclass(frozen=True)
class Calibrated(Pass):
    """A pass that may collect statistics of activations.

    Raises:
        UsageError: `calib_size` or `calib_length` is less than 1.
        JobError: `calib` is no file.
    """

    calib: str | None = option(
        None, "Calibration data: texts (.jsonl, .txt), or inputs of the graph (.npz).", path=True
    )
    calib_field: str = option("text", "Field of the JSONL that holds the text; a list of numbers is taken as tokens.")
    calib_size: int = option(128, "How many texts are used.")
    calib_length: int = option(512, "Longest text in tokens; a .txt file is cut into texts of this length.")
    calib_cache: str | None = option(
        None, "Folder that keeps what each layer showed: a run that was stopped goes on from there.", path=True
    )
    tokenizer: str | None = option(
        None, "tokenizer.json, or its folder; without it the one beside the model.", path=True
    )

    def __post_init__(self) -> None:
        for name in ("calib_size", "calib_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{self.name}: {name} is {getattr(self, name)}; it takes 1 or more")
        if self.calib is not None and not Path(self.calib).is_file():
            raise JobError(f"{self.name}: --calib {self.calib}: no such file; name a .jsonl, .txt or .npz file")
