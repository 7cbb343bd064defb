"""Rotary position embedding: frequencies and their scaling, as `transformers.modeling_rope_utils` defines them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial as bound
from typing import Any

import numpy as np

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown

Array = np.ndarray[Any, np.dtype[np.float64]]

MAX_HEAD_DIM = 1 << 16
_MAX_TABLE = 1 << 27
"""Largest positions x channels: a million x 128; cos and sin are half a GiB each while they are computed."""


@dataclass(frozen=True)
class Rope:
    """Rotation of the first `dim` channels of a head by halves (channel j with j + dim / 2).

    Attributes:
        theta: the base of the frequencies.
        kind: default, linear, dynamic, llama3, yarn or longrope.
        scaling: the parameters of the kind, in Hugging Face's names.
        factors: extra divisors of the frequencies, [dim / 2] (GGUF's `rope_freqs.weight`); none by default.
        interleaved: channel 2 j is rotated with 2 j + 1 instead (GPT-J).
    """

    dim: int
    theta: float
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes and factors that no model has, before tables are computed.

        Raises:
            ModelError: `dim` or `factors` are out of range.
        """
        if not 1 <= self.dim <= MAX_HEAD_DIM:
            raise ModelError(f"rope: {self.dim} channels of a head are rotated; it must be 2 to {MAX_HEAD_DIM}")
        if self.factors and (len(self.factors) != self.dim // 2 or not all(map(is_positive, self.factors))):
            raise ModelError(
                f"rope: the factors of its frequencies are {shown(self.factors)}; they must be {self.dim // 2} "
                "positive numbers"
            )

    @property
    def switch(self) -> int | None:
        """The longest sequence in tokens that LongRoPE rotates by its short factors; None for other kinds."""
        return int(self.scaling["original_max_position_embeddings"]) if self.kind == "longrope" else None

    def tables(self, length: int) -> tuple[Array, Array]:
        """cos and sin of position x frequency, each float64 [length, dim / 2].

        For LongRoPE the `switch` rows of the short factors stand before those of the long ones.

        Raises:
            ModelError: they would fill the memory.
        """
        parts = [self._table(length, long=True)]
        if self.switch is not None:
            parts.insert(0, self._table(self.switch, long=False))
        cos, sin = (np.concatenate(tables) if len(tables) > 1 else tables[0] for tables in zip(*parts, strict=True))
        return cos, sin

    def _table(self, length: int, *, long: bool) -> tuple[Array, Array]:
        if length * self.dim > _MAX_TABLE:
            raise ModelError(
                f"rope: tables of {length} positions and {self.dim} channels have more than {_MAX_TABLE} numbers; "
                "lower max_position_embeddings"
            )
        frequencies, factor = _longrope(self, long=long) if self.kind == "longrope" else _KINDS[self.kind](self)
        if self.factors:
            frequencies = frequencies / np.asarray(self.factors)
        angles = np.outer(np.arange(length, dtype=np.float64), frequencies)
        return np.cos(angles) * factor, np.sin(angles) * factor


def rope_of(
    config: Mapping[str, Any],
    family: str,
    head_dim: int,
    *,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rope:
    """The rotation of a Hugging Face configuration.

    It is read from `rope_scaling` and `rope_theta`, or from `rope_parameters` (transformers 5); the former win, as in
    transformers.

    Args:
        partial: share of the channels that is rotated by default; None where the family rotates all channels.
        interleaved: neighbouring channels are rotated together.

    Raises:
        ModelError: a kind that is not supported, or parameters that are missing or no numbers.
    """
    parameters: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(
            f"{family}: rope_parameters is {shown(parameters)}, not a mapping; fetch the configuration again"
        )
    kind = next((parameters[name] for name in ("rope_type", "type") if parameters.get(name) is not None), "default")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelError(f"{family}: the rope type {shown(kind)} is not supported; {', '.join(_KINDS)} are")
    scaling = {
        "original_max_position_embeddings": config.get("max_position_embeddings"),
        **{k: v for k, v in parameters.items() if v is not None},
    }
    original = config.get("original_max_position_embeddings")  # outside it wins, as in transformers
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    original = scaling["original_max_position_embeddings"]
    if kind in ("yarn", "longrope") and is_positive(original) and is_positive(config.get("max_position_embeddings")):
        scaling.setdefault("factor", config["max_position_embeddings"] / scaling["original_max_position_embeddings"])
    for name in (*_NUMBERS, *_NEEDED[kind]):
        value = scaling.get(name)
        if value is not None and not is_positive(value):
            raise ModelError(f"{family}: rope's {name} is {shown(value)}; it must be a positive number")
    absent = [name for name in _NEEDED[kind] if scaling.get(name) is None]
    if absent:
        raise ModelError(f"{family}: rope type {kind} needs {', '.join(absent)}; fetch the configuration again")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ModelError(
            f"{family}: rope's low_freq_factor {scaling['low_freq_factor']} is not below its high_freq_factor "
            f"{scaling['high_freq_factor']}"
        )
    settings = {
        "partial_rotary_factor": partial or 1.0,
        "rope_theta": 10000.0,
        **{k: v for k, v in config.items() if v is not None},
        **scaling,
    }
    for name in ("partial_rotary_factor", "rope_theta"):
        if not is_positive(settings[name]):
            raise ModelError(f"{family}: {name} is {shown(settings[name])}; it must be a positive number")
    if (kind == "yarn" and settings["rope_theta"] <= 1) or (kind == "longrope" and scaling[_ORIGINAL] <= 1):
        raise ModelError(f"{family}: rope type {kind} needs a rope_theta and an {_ORIGINAL} above 1; correct them")
    share, theta = float(settings["partial_rotary_factor"]), float(settings["rope_theta"])
    if partial is None and share != 1:
        raise ModelError(
            f"{family}: partial_rotary_factor is {share}, which this family does not have; check the model_type"
        )
    rope = Rope(int(head_dim * share), theta, kind, scaling, interleaved=interleaved)
    if kind == "longrope":
        _check_longrope(rope, family)
    if not np.isfinite(rope.tables(2)).all():
        raise ModelError(
            f"{family}: rope parameters {shown(scaling)} give no finite angles; fetch the configuration again"
        )
    return rope


def _check_longrope(rope: Rope, family: str) -> None:
    for name in ("short_factor", "long_factor"):
        factors = rope.scaling.get(name)
        if not isinstance(factors, list) or len(factors) != rope.dim // 2 or not all(map(is_positive, factors)):
            raise ModelError(
                f"{family}: rope's {name} is {shown(factors)}; it must be {rope.dim // 2} positive numbers"
            )


def is_positive(value: Any) -> bool:
    """Whether `value` is a number above 0 and below 1e30; a boolean is no number."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < 1e30


def _default(rope: Rope) -> tuple[Array, float]:
    """theta^(-2j / dim) (Su et al., arXiv 2104.09864, section 3.4.2)."""
    return 1.0 / rope.theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim), 1.0


def _linear(rope: Rope) -> tuple[Array, float]:
    """Positions divided by the factor (Chen et al., arXiv 2306.15595)."""
    return _default(rope)[0] / float(rope.scaling["factor"]), 1.0


def _longrope(rope: Rope, *, long: bool) -> tuple[Array, float]:
    """Each frequency divided by a factor of its own, of short or long texts (Ding et al., arXiv 2402.13753)."""
    factors = np.asarray(rope.scaling["long_factor" if long else "short_factor"], np.float64)
    factor, original = float(rope.scaling["factor"]), float(rope.scaling["original_max_position_embeddings"])
    attention = rope.scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return _default(rope)[0] / factors, float(attention)


def _llama3(rope: Rope) -> tuple[Array, float]:
    """Low frequencies are divided by the factor, high ones kept, those between blended (Llama 3.1's reference code)."""
    plain, _ = _default(rope)
    s = {name: float(rope.scaling[name]) for name in _NEEDED["llama3"]}
    wavelength = 2 * math.pi / plain
    smooth = (s["original_max_position_embeddings"] / wavelength - s["low_freq_factor"]) / (
        s["high_freq_factor"] - s["low_freq_factor"]
    )
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * plain / s["factor"] + smooth * plain, 1.0


def _yarn(rope: Rope) -> tuple[Array, float]:
    """NTK-by-parts interpolation and a factor on cos and sin (Peng et al., arXiv 2309.00071, sections 3.2 to 3.4)."""
    plain, _ = _default(rope)
    scaling = rope.scaling
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])

    def pair(rotations: float) -> float:
        """The (fractional) pair whose channel turns `rotations` times over the original length."""
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(float(scaling.get("beta_fast") or 32)), pair(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        scale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            yarn_magnitude(factor, scale) / yarn_magnitude(factor, all_dim)
            if scale and all_dim
            else yarn_magnitude(factor)
        )
    return plain / factor * ramp + plain * (1 - ramp), float(attention)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor on cos and sin where positions are stretched by `factor`: 0.1 scale ln(factor) + 1, or 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


_KINDS: dict[str, Callable[[Rope], tuple[Array, float]]] = {
    "default": _default, "linear": _linear, "dynamic": _default, "llama3": _llama3, "yarn": _yarn,
    "longrope": bound(_longrope, long=True),
}  # fmt: skip
"""`dynamic` changes frequencies only beyond max_position_embeddings, where the tables end."""
_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
