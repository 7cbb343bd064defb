"""Settings of Hugging Face's configurations: the values under their spellings, checked, with errors that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import Activation
from onnxtools.exporter.rope import is_positive

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "silu": "silu",
    "swish": "silu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""Hugging Face's names of activations (transformers.activations.ACT2FN)."""


def integer(config: Mapping[str, Any], family: str, *names: str, default: int | None = None) -> int:
    """The value of the first of `names` that is not null; all spellings of one setting must agree.

    Raises:
        ModelError: the value is no positive integer, two spellings differ, or there is neither a value nor a default.
    """
    values = {name: config[name] for name in names if config.get(name) is not None}
    if len({shown(value) for value in values.values()}) > 1:
        raise ModelError(
            f"{family}: {' and '.join(f'{name} is {shown(value)}' for name, value in values.items())}; they mean the "
            "same, correct one"
        )
    if not values:
        if default is None:
            raise ModelError(
                f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
            )
        return default
    name, value = next(iter(values.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive integer")
    return value


def number(config: Mapping[str, Any], family: str, *names: str, default: float | None = None) -> float:
    """The value of the first of `names` that is not null, as a float.

    Raises:
        ModelError: the value is no positive finite number, or there is neither a value nor a default.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not is_positive(value):
            raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive number")
        return float(value)
    if default is None:
        raise ModelError(
            f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
        )
    return default


def flag(config: Mapping[str, Any], family: str, name: str, default: bool) -> bool:
    """The boolean `name`, or `default` where it is null.

    Raises:
        ModelError: the value is no boolean; the string "false" is none.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be true or false")
    return value


_REFUSED: dict[str, object] = {"add_cross_attention": True, "is_causal": False, "use_bidirectional_attention": True}
"""Settings of Hugging Face configurations, each with the value that makes a model of another kind."""


def check_plain(config: Mapping[str, Any], family: str, *, windows: bool = False) -> None:
    """Refuse configurations of models that are no plain causal decoder.

    Args:
        windows: the family reads sliding windows itself (`windows_of`).

    Raises:
        ModelError: stored quantization, cross-attention, or attention that is not causal.
    """
    if config.get("quantization_config"):
        raise ModelError(
            f"{family}: has a quantization_config: its weights are stored quantized, which is not supported; export "
            "the original checkpoint"
        )
    known = ("full_attention", "sliding_attention") if windows else ("full_attention",)
    kinds = config.get("layer_types") or ()
    others = [kind for kind in kinds if kind not in known] if isinstance(kinds, (list, tuple)) else [kinds]
    if others or (not windows and config.get("use_sliding_window") is True):
        raise ModelError(
            f"{family}: has layers of {shown(others[0]) if others else 'sliding_window'} attention, which is not "
            f"supported; {' and '.join(known)} {'are' if windows else 'is'}"
        )
    for name, value in _REFUSED.items():
        if config.get(name) is value:
            raise ModelError(
                f"{family}: {name} is {str(value).lower()}, which is not supported; only causal decoders are"
            )


def windows_of(config: Mapping[str, Any], family: str, kinds: Sequence[str]) -> list[int | None]:
    """The window of each layer, None where a token sees all before it.

    Args:
        kinds: `full_attention` or `sliding_attention` of each layer, where the configuration has no layer_types.

    Raises:
        ModelError: layer_types are not one for each layer, or there is no window for a sliding layer.
    """
    stated = config.get("layer_types")
    if stated is not None and (not isinstance(stated, list) or len(stated) != len(kinds)):
        raise ModelError(f"{family}: layer_types is {shown(stated)}; it names the attention of {len(kinds)} layers")
    layers = stated or kinds
    sliding = "sliding_attention" in layers
    window = integer(config, family, "sliding_window") if sliding else None
    return [window if kind == "sliding_attention" else None for kind in layers]


def head_dim_of(family: str, hidden: Any, heads: Any) -> int:
    """hidden_size / heads.

    Raises:
        ModelError: `hidden` is not divisible by `heads`, or one of them is no integer.
    """
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ModelError(
            f"{family}: hidden size {shown(hidden)} is not divisible by {shown(heads)} heads; check the configuration"
        )
    return hidden // heads


def need(config: Mapping[str, Any], family: str, *names: str) -> Any:
    """The value of the first of `names` that is not null.

    Raises:
        ModelError: the configuration has none of them.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ModelError(
        f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
    )


def activation_of(config: Mapping[str, Any], family: str, name: str, default: str) -> Activation:
    """The activation that a Hugging Face configuration names, or `default`.

    Raises:
        ModelError: it is no string, or not a supported activation.
    """
    activation = default if config.get(name) is None else config[name]
    if not isinstance(activation, str):
        raise ModelError(f"{family}: {name} is {shown(activation)}; it must be the name of an activation")
    if activation not in ACTIVATIONS:
        raise ModelError(f"{family}: the activation {shown(activation)} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[activation]
