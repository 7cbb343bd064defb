"""`ModelInfo`: a model's special tokens and positions, from its own description or from files of other exporters."""

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
"""Configurations that other exporters write beside their graphs."""
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_POSITIONS = ("context_length", "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that its inputs and outputs do not show.

    Attributes:
        folder: the folder of its tokenizer.
        eos_token_ids: tokens that end a text; empty if unknown.
        pad_token_id: the padding token; the first end token, or 0, if unknown.
        bos_token_id: the token that begins a text, or None.
        max_positions: most tokens of a sequence; None if unknown.
        raw: the content of onnxtools.json; None if there is none.
    """

    folder: Path
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    bos_token_id: int | None = None
    max_positions: int | None = None
    raw: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, str]) -> ModelInfo:
        """Reads the description in the graph's metadata, else onnxtools.json beside it, else other exporters' files.

        Args:
            path: the graph or engine.
            metadata: its metadata.

        Raises:
            JobError: a file cannot be read, or holds impossible values.
        """
        if MODEL_KEY in metadata:
            raw = json_object(metadata[MODEL_KEY].encode(errors="replace"), f"{path}: its metadata {MODEL_KEY}")
        elif (path.parent / INFO_FILE).exists():
            raw = read_json(path.parent / INFO_FILE)
        else:
            return cls._foreign(path)
        tokens, positions = raw.get("tokens"), nested(raw, "model", "max_position_embeddings")
        if not isinstance(tokens, Mapping) or positions is None:
            raise JobError(
                f"{path}: its {INFO_FILE} has no tokens, or no max_position_embeddings; export the model again"
            )
        return cls._of(
            path.parent,
            {**tokens, "eos_token_id": tokens.get("eos_token_ids")},
            positions,
            f"{path}: its {INFO_FILE}",
            raw,
        )

    @classmethod
    def _foreign(cls, path: Path) -> ModelInfo:
        """Reads other exporters' files.

        A value comes from the first file that holds it, in the order generation_config.json, genai_config.json (ONNX
        Runtime GenAI), config.json, tokenizer_config.json. The files lie beside the graph, or in the parent folder if
        the graph's folder is called `onnx` (the layout of Optimum and transformers.js).
        """
        above = path.parent.name == "onnx" and not any((path.parent / name).exists() for name in FOREIGN)
        folder = path.parent.parent if above else path.parent
        configs = {name: read_json(folder / name) if (folder / name).exists() else {} for name in FOREIGN}
        genai, config = nested(configs["genai_config.json"], "model") or {}, configs["config.json"]
        sources = [configs["generation_config.json"], genai, config, nested(config, "text_config") or {}]
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
        """Checks the values and returns the facts.

        Raises:
            JobError: an id is no integer of 0 or more, or `positions` is no integer of 1 or more.
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
    """Returns `bos_token_id`, `eos_token_ids` (a tuple) and `pad_token_id` of a Hugging Face configuration.

    Values of generation_config.json (the key `_generation`) take precedence.

    Raises:
        ModelError: an id is no integer from 0 to 2^31 - 1.
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
    """Returns a token id; None if there is no token, which older configurations write as -1."""
    if value is None or (value == -1 and isinstance(value, int)):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ModelError(f"{name} is {shown(value)}; it must be a token's number, or null")
    return value
