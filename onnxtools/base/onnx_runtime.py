"""The one import of ONNX Runtime. It reports how ONNX Runtime's two packages break each other."""

from __future__ import annotations

import functools
import importlib
import logging
from importlib import metadata
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.extras import install_line

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_LOG = logging.getLogger("onnxtools")


@functools.cache
def onnxruntime() -> Any:
    """Returns the module `onnxruntime`, which the packages onnxruntime and onnxruntime-gpu both install.

    pip allows both packages at once. The package installed last has overwritten the files of the other, and
    uninstalling either removes files of both.

    Raises:
        JobError: ONNX Runtime is not installed, or some of its files are missing.
    """
    versions = _installed()
    try:
        module = importlib.import_module("onnxruntime")
        module.InferenceSession  # noqa: B018  # the remains of an uninstalled package import, but have no attributes
    except (ImportError, AttributeError) as error:
        if not versions:
            raise JobError(
                f"ONNX Runtime is not installed; {install_line('cpu')}, or with CUDA: {install_line('gpu')}"
            ) from None
        raise JobError(
            f"ONNX Runtime is broken ({' and '.join(versions)} installed: {error}); uninstall onnxruntime and "
            f"onnxruntime-gpu, then {install_line('cpu')}, or with CUDA: {install_line('gpu')}"
        ) from None
    if len(versions) > 1:
        cuda = "CUDAExecutionProvider" in module.get_available_providers()
        _LOG.warning(
            "%s are both installed and overwrite each other; version %s with%s CUDA is what runs. Uninstall both, then "
            "install one",
            " and ".join(versions),
            module.__version__,
            "" if cuda else "out",
        )
    return module


def _installed() -> list[str]:
    """Returns the installed packages of ONNX Runtime, each as "NAME VERSION"."""
    packages = []
    for package in _PACKAGES:
        try:
            packages.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return packages
