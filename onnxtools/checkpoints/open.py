"""Chooses the reader for a path."""

from __future__ import annotations

from pathlib import Path

from onnxtools.base.errors import ModelError, OnnxtoolsError, one_line
from onnxtools.base.inputs import absent
from onnxtools.checkpoints.checkpoint import Checkpoint


def open_checkpoint(path: Path, *, weights: bool = True) -> Checkpoint:
    """Opens a Hugging Face folder, a .nemo archive or folder, a .ckpt, or a GGUF file.

    Any other error of a reader on a damaged file becomes a ModelError of one line.

    Args:
        path: the folder or file.
        weights: False reads the configuration of a folder alone.

    Raises:
        ModelError: the path does not exist, no reader knows it, or it is damaged.
    """
    try:
        return _open(path, weights)
    except OnnxtoolsError:
        raise
    except Exception as error:
        detail = one_line(error, 120)
        raise ModelError(
            f"{path}: is damaged, or not what its name says ({type(error).__name__}: {detail}); fetch it again"
        ) from error


def _open(path: Path, weights: bool) -> Checkpoint:
    """Does the work of `open_checkpoint`. A damaged file may raise any exception."""
    if not path.exists():
        raise ModelError(f"{absent(path)}: no such file or folder; check the path")
    if path.is_dir():
        if (path / "config.json").is_file():
            from onnxtools.checkpoints.huggingface import read_folder

            return read_folder(path, weights=weights)
        if any((path / name).exists() for name in ("model_config.yaml", "weights", "context")):
            from onnxtools.checkpoints.nemo import read_nemo

            return read_nemo(path, weights=weights)
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{path}: is a PEFT adapter, not a model; merge it into its base model (`merge_and_unload()` of peft), "
                "save that and export it"
            )
        raise ModelError(
            f"{path}: has neither config.json (Hugging Face) nor model_config.yaml (NeMo); name the folder of the "
            "checkpoint"
        )
    if path.suffix == ".gguf":
        from onnxtools.checkpoints.gguf import read_gguf

        return read_gguf(path)
    if path.suffix in (".nemo", ".ckpt"):
        from onnxtools.checkpoints import nemo

        return nemo.read_nemo(path) if path.suffix == ".nemo" else nemo.read_ckpt(path)
    if path.suffix in (".safetensors", ".bin"):
        raise ModelError(
            f"{path}: weights alone do not say what model they are; name the folder that holds config.json too"
        )
    raise ModelError(
        f"{path}: no reader for {path.suffix or 'a file without suffix'}; a Hugging Face folder, .nemo, .ckpt or .gguf "
        "can be read"
    )
