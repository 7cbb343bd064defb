"""`ModelInfo`: what is known of a model beyond its inputs and outputs, from its own description or from the files of
other exporters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import json_object, nested, read_json
from onnxtools.checkpoints.special_tokens import ids_by_name
from onnxtools.ir.description import INFO_FILE, MODEL_KEY

FOREIGN = ("generation_config.json", "genai_config.json", "config.json")
"""Configurations beside the graphs of other exporters."""
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_POSITIONS = ("context_length", "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model beyond its inputs and outputs.

    Attributes:
        folder: where its tokenizer is looked for.
        eos_token_ids: tokens that end a text; empty where nobody knows.
        max_positions: tokens that a sequence may have; None where nobody knows.
        raw: the content of onnxtools.json.
    """

    folder: Path
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    bos_token_id: int | None = None
    max_positions: int | None = None
    raw: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str]) -> ModelInfo:
        """Of the graph's metadata, else of the onnxtools.json beside it, else of the configurations that other
        exporters put there.

        Raises:
            JobError: what is there cannot be read, or says what no model has.
        """
        if MODEL_KEY in metadata:
            raw = json_object(metadata[MODEL_KEY].encode(errors="replace"), f"{path}: its metadata {MODEL_KEY}")
        elif (path.parent / INFO_FILE).exists():
            raw = read_json(path.parent / INFO_FILE)
        else:
            return cls._foreign(path)
        says = raw.get("tokens"), nested(raw, "model", "max_position_embeddings")
        if not isinstance(says[0], Mapping) or says[1] is None:
            raise JobError(
                f"{path}: its {INFO_FILE} has no tokens, or no max_position_embeddings; export the model again"
            )
        return cls._of(
            path.parent,
            {**says[0], "eos_token_id": says[0].get("eos_token_ids")},
            says[1],
            f"{path}: its {INFO_FILE}",
            raw,
        )

    @classmethod
    def _foreign(cls, path: Path) -> ModelInfo:
        """Of generation_config.json, else genai_config.json (ONNX Runtime GenAI), config.json, tokenizer_config.json,
        each where the former are silent.

        They lie beside the graph, or above it where its folder is called `onnx` (Optimum's and transformers.js's
        layout).
        """
        above = path.parent.name == "onnx" and not any((path.parent / name).exists() for name in FOREIGN)
        folder = path.parent.parent if above else path.parent
        found = {name: read_json(folder / name) if (folder / name).exists() else {} for name in FOREIGN}
        genai, config = nested(found["genai_config.json"], "model") or {}, found["config.json"]
        sources = [found["generation_config.json"], genai, config, nested(config, "text_config") or {}]
        merged = {
            key: value
            for source in reversed(sources)
            if isinstance(source, Mapping)
            for key, value in source.items()
            if value is not None
        }
        merged |= ids_by_name(folder, [key for key in _TOKENS if key not in merged])
        places = [source for source in sources[1:] if isinstance(source, Mapping)]
        positions = next((source[key] for source in places for key in _POSITIONS if source.get(key) is not None), None)
        return cls._of(folder, merged, positions, str(folder), None)

    @classmethod
    def _of(
        cls, folder: Path, tokens: Mapping[str, Any], positions: Any, label: str, raw: Mapping[str, Any] | None
    ) -> ModelInfo:
        """Checked.

        Raises:
            JobError: ids that are no numbers of 0 or more, or positions that are none of 1 or more.
        """
        try:
            ids = token_ids({key: tokens.get(key) for key in _TOKENS})
        except ModelError as error:
            raise JobError(f"{label}: {error}") from None
        if positions is not None and (type(positions) is not int or positions < 1):
            raise JobError(
                f"{label}: max_position_embeddings is {shown(positions)}; it must be a number of 1 or more, or be left "
                "out"
            )
        ends, pad = ids["eos_token_ids"], ids["pad_token_id"]
        return cls(
            folder, ends, pad if pad is not None else (ends[0] if ends else 0), ids["bos_token_id"], positions, raw
        )


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad ids of a Hugging Face configuration; generation_config.json decides where it speaks.

    Raises:
        ModelError: an id that is none.
    """
    both = {**config, **{key: value for key, value in config.get("_generation", {}).items() if value is not None}}
    eos = both.get("eos_token_id")
    ends = [_token_id(token, "eos_token_id") for token in (eos if isinstance(eos, list) else [eos])]
    return {
        "bos_token_id": _token_id(both.get("bos_token_id"), "bos_token_id"),
        "eos_token_ids": tuple(token for token in ends if token is not None),
        "pad_token_id": _token_id(both.get("pad_token_id"), "pad_token_id"),
    }


def _token_id(value: Any, name: str) -> int | None:
    """A token; None where there is none, which older configurations spell -1."""
    if value is None or (value == -1 and isinstance(value, int)):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ModelError(f"{name} is {shown(value)}; it must be a token's number, or null")
    return value
