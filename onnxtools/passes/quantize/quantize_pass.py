"""Put FP8, INT8 or INT4 into the graph as standard Q/DQ, with scales from calibration."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse
from onnxtools.analysis.products import Product, unreached, weight_products
from onnxtools.analysis.readers import own_weights
from onnxtools.base.errors import JobError, NoMatchError, UsageError
from onnxtools.base.options import option
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.calibration.run import Calibration, Findings, Layer
from onnxtools.calibration.statistics import Observer, RowCount
from onnxtools.ir.description import record_dtypes
from onnxtools.ir.edit import remove_unused
from onnxtools.ir.model import Model
from onnxtools.ir.query import is_op
from onnxtools.numerics.formats import FP8, INT4, INT8, Format
from onnxtools.passes.lower_ort import LowerOrt
from onnxtools.passes.precision import Precision
from onnxtools.passes.qdq import COMPUTED, QdqBuilder, is_quantized
from onnxtools.passes.quantize.attention_operands import AttentionScheme, operands, score_products
from onnxtools.passes.quantize.cache_tensors import KvScheme, caches
from onnxtools.passes.quantize.convolutions import ConvScheme
from onnxtools.passes.quantize.groups import Group, group
from onnxtools.passes.quantize.int4 import Int4Scheme, block_size
from onnxtools.passes.quantize.linear import LinearScheme
from onnxtools.passes.quantize.scheme import Scheme
from onnxtools.passes.selection import Selected, counts_left, head_product
from onnxtools.passes.set_opset import SetOpset
from onnxtools.pipeline.passbase import Pass, PassResult

_TOO_SMALL = 16
_UNSEEN = "unseen"
"""Products with K or N below this are not quantized."""


@dataclass(frozen=True)
class Quantize(Selected, Calibrated):
    """Quantize the products of a model to FP8, INT8 or INT4.

    Rules:
      - fp8: activations with one scale, weights with one or one for each output channel, stored as FLOAT8E4M3FN;
      - int8: the same in INT8; --smoothquant folds a factor for each channel into the norm or product before, so that
        the graph gains no node; only products behind norms (QKV and FC1) are quantized, unless --all-layers;
      - int4-awq: weights alone, with a scale for each block along K, scaled and clipped by the activations; int4-rtn:
        the same rounded to nearest, without calibration data;
      - --attention: queries, keys and values of attention too (and its probabilities, where it is MatMul and Softmax);
      - --kv-cache: new keys and values are quantized before they are written, all are dequantized when they are read;
      - --gptq needs the Gram matrix of each input: K x K numbers in memory, and time that grows with N x K x K;
      - Conv in FP8 and INT8: one scale for the input, one for each output channel of the weight;
      - the opset is raised where the format needs it;
      - products with K or N below 16, the head, and the products that --exclude names are not quantized;
      - the result is standard ONNX: Q/DQ-19, and DequantizeLinear-21 for blocks.
    """

    name = "quantize"
    numerics = "lossy"
    example = "onnxtools quantize model.onnx fp8.onnx --fp8 --calib texts.jsonl"

    scheme: Literal["none", "fp8", "int8", "int4-awq", "int4-rtn"] = option(
        "none",
        "What to quantize to.",
        flags={"--fp8": "fp8", "--int8": "int8", "--int4-awq": "int4-awq", "--int4-rtn": "int4-rtn"},
    )
    smoothquant: float | None = option(None, "INT8 with SmoothQuant of this strength, 0 to 1; 0.5 suits most models.")
    per_token: bool = option(False, "INT8 activations get a scale for each token, computed in the graph.")
    per_channel: bool = option(False, "Weights of FP8 and INT8 get a scale for each output channel.")
    all_layers: bool = option(False, "INT8 also behind attention and in FC2, not only behind norms.")
    block_size: int | None = option(
        None, "Elements along K that share an INT4 scale; without it 128, or 64 or 32 where K is no multiple."
    )
    calib_method: Literal["max", "percentile", "mse"] = option(
        "max", "Range of an activation: largest magnitude, 99.99th percentile, or least squared error."
    )
    kv_cache: Literal["none", "fp8", "int8"] = option("none", "Store keys and values of the cache in 8 bits.")
    attention: bool = option(False, "FP8 also for what attention multiplies: queries, keys, probabilities and values.")
    lower: Literal["none", "ort"] = option(
        "none", "ort: go on with lower-ort, for a file that only ONNX Runtime reads."
    )
    gptq: bool = option(
        False, "Round each weight so that it makes up for the rounding before it (GPTQ), instead of to the nearest."
    )
    qformat: Literal["full_prec", "fp8", "int4_awq", "int8_sq"] | None = option(
        None, "Nemotron's quantize.py: what to quantize to; int8_sq is SmoothQuant 0.5."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "Nemotron's quantize.py: the type of what is not quantized, by `precision`."
    )
    kv_cache_dtype: Literal["none", "fp8", "int8"] | None = option(None, "Nemotron's quantize.py: same as --kv-cache.")
    exclude_worst: int = option(0, "Leave the N products with the largest output error in their own precision.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothquant is not None:
            if not 0 <= self.smoothquant <= 1:
                raise UsageError(f"quantize: smoothquant is {self.smoothquant}; alpha takes 0 to 1")
            if self.scheme not in ("none", "int8"):
                raise UsageError(f"quantize: --smoothquant is INT8 and --{self.scheme} is not; leave one out")
        if self.qformat is not None and (self.scheme != "none" or self.smoothquant is not None):
            raise UsageError("quantize: --qformat and the scheme's own option contradict each other; leave one out")
        if self.kind == "none" and self.kv_kind == "none" and self.dtype in (None, "float32"):
            raise UsageError(
                "quantize: nothing to do; say --fp8, --smoothquant ALPHA, --int8, --int4-awq, --int4-rtn or --kv-cache"
            )
        int8, int4 = self.kind == "int8", self.kind.startswith("int4")
        rules = (
            (self.per_token and not int8, "--per-token is for INT8"),
            (self.per_channel and int4, "--per-channel is for FP8 and INT8"),
            (self.attention and self.kind != "fp8", "--attention is for FP8"),
            (self.all_layers and not int8, "--all-layers is for INT8"),
            (self.block_size is not None and not int4, "--block-size is for INT4"),
            (self.calib_method != "max" and (int4 or self.per_token or self.smoothquant is not None),
                "--calib-method is for static scales without smoothing"),
            (self.gptq and self.kind in ("none", "int4-rtn"), "--gptq is for weights that are calibrated"),
            (self.lower == "ort" and not int4, "--lower ort is for INT4: MatMulNBits is what it has fast kernels for"),
            (self.kv_cache_dtype is not None and self.kv_cache not in ("none", self.kv_cache_dtype),
                "--kv-cache and --kv-cache-dtype contradict each other"),
            (self.exclude_worst and self.kind in ("int4-rtn", "none"),
                "--exclude-worst is for products that are calibrated"),
            (self.calib is not None and self.kind == "int4-rtn" and self.kv_kind == "none",
                "--int4-rtn looks at no activations, so --calib is of no use"),
        )  # fmt: skip
        for wrong, message in rules:
            if wrong:
                raise UsageError(f"quantize: {message}; leave it out")
        if self.block_size is not None and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise UsageError(f"quantize: block size is {self.block_size}; it takes a power of two from 16")
        if self.exclude_worst < 0:
            raise UsageError(f"quantize: exclude-worst is {self.exclude_worst}; it takes 0 or more")

    @property
    def kind(self) -> str:
        """The scheme that applies: none, fp8, int8, int4-awq or int4-rtn."""
        if self.qformat is not None:
            return {"full_prec": "none", "fp8": "fp8", "int4_awq": "int4-awq", "int8_sq": "int8"}[self.qformat]
        return "int8" if self.smoothquant is not None else self.scheme

    @property
    def alpha(self) -> float | None:
        """SmoothQuant's migration strength; None without SmoothQuant."""
        return 0.5 if self.qformat == "int8_sq" else self.smoothquant

    @property
    def kv_kind(self) -> str:
        """The type of the cache that applies: none, fp8 or int8."""
        return self.kv_cache_dtype or self.kv_cache

    @property
    def form(self) -> Format:
        """The format of the weights, or of the cache where only the cache is quantized."""
        return {"fp8": FP8, "int8": INT8, "none": FP8 if self.kv_kind == "fp8" else INT8}.get(self.kind, INT4)

    def expand(self) -> list[Pass]:
        narrow: list[Pass] = (
            [Precision(to="bf16" if self.dtype == "bfloat16" else "fp16")]
            if self.dtype in ("bfloat16", "float16")
            else []
        )
        if self.kind == "none" and self.kv_kind == "none":
            return narrow
        settings = {"scheme": self.kind, "smoothquant": self.alpha, "kv_cache": self.kv_kind}
        plain = dataclasses.replace(self, **settings, qformat=None, dtype=None, kv_cache_dtype=None, lower="none")  # type: ignore[arg-type]
        return [*narrow, plain, *([LowerOrt()] if self.lower == "ort" else [])]

    @property
    def rewrites_weights(self) -> bool:
        return True

    def apply(self, model: Model) -> PassResult:
        raised = SetOpset(version=self.form.opset).apply(model).notes if model.opset < self.form.opset else []
        extra = [f"{self.form.name} needs opset {self.form.opset}: {note}" for note in raised]
        chosen, table = self._choose(model) if self.kind != "none" else ([], [])
        facts = analyse(model)
        kv = KvScheme(FP8 if self.kv_kind == "fp8" else INT8, caches(model, facts)) if self.kv_kind != "none" else None
        attention = AttentionScheme(FP8, operands(model, facts)) if self.attention else None
        convolutions = ConvScheme(self.form, self._convolutions(model, table), self.calib_method)
        if self.kind != "none":
            table += [_row(place.node, place.weight, place.reason) for place in unreached(model)]
        if not chosen and kv is None and attention is None and not convolutions.products:
            raise NoMatchError(_nothing(model, table))
        groups = group(model, chosen, facts)
        if self.kind == "int8" and not self.all_layers:
            groups = self._behind_norms(groups, table, bool(convolutions.products))
        extra += self._left_out_of(convolutions)
        more = (kv, attention, convolutions if convolutions.products else None)
        inner = [part for part in more if part is not None]
        scheme, findings = self._calibrated(model, facts, groups, inner)
        unseen = [p for g in groups if f"{g.index}.{_UNSEEN}" in findings for p in g.products]
        self._leave(table, unseen, "saw no calibration token (an expert that no text chose)")
        if unseen:
            extra.append(
                f"warning: {len(unseen)} products saw no calibration token and are left; calibrate on more texts"
            )
        self._drop_worst(groups, findings, table)
        build = QdqBuilder(model)
        self._write(groups, findings, scheme, table, build)
        if kv is not None:
            table += [kv.emit(build, findings, cache) for cache in kv.caches]
            record_dtypes(model, cache=self.kv_kind)
            extra = kv.notes()
        if attention is not None:
            table += [
                attention.emit(build, findings, operand) for operand in attention.operands if not operand.is_quantized()
            ]
        table += [convolutions.emit(build, findings, product) for product in convolutions.products]
        model.graph.sort()
        remove_unused(model)
        return PassResult(
            True, sum(not row["left"] for row in table), self._notes(table) + extra, table, _summary(table)
        )

    # --- what to quantize --------------------------------------------------------------------------------------------

    def _choose(self, model: Model) -> tuple[list[Product], list[dict[str, Any]]]:
        head, table, chosen = head_product(model), [], []
        products = [p for p in weight_products(model) if p.node.op_type != "Conv"]
        body = [p for p in products if p.node is not head]
        if body and all(map(is_quantized, body)):
            raise JobError(
                f"{model.path}: its products are quantized already; start from the model in its own precision"
            )
        for product in products:
            reason = self._reason(product, head)
            table.append(_row(product.node.name, product.weight.name, reason))
            if not reason:
                chosen.append(product)
        return own_weights(model, chosen), table

    def _convolutions(self, model: Model, table: list[dict[str, Any]]) -> list[Product]:
        """The convolutions that FP8 and INT8 with static scales quantize; the reason why others stay is in `table`."""
        static = self.kind in ("fp8", "int8") and not self.per_token and self.alpha is None
        chosen = []
        for product in weight_products(model):
            if product.node.op_type != "Conv" or self.kind == "none":
                continue
            between = next((node.op_type for node in product.path if node.op_type != "Identity"), None)
            reason = self.reason_excluded(product, None)
            if not reason and not static:
                reason = "convolution (--fp8 and --int8 with static scales take it)"
            if not reason and (product.quantized or is_op(product.activation.producer(), "DequantizeLinear")):
                reason = "quantized already"
            if not reason and between is not None:
                reason = f"its weight goes through {between} (fold-constants computes it)"
            if not reason and product.tensor.dtype not in COMPUTED:
                reason = f"type {product.tensor.dtype.name}"
            if reason:
                table.append(_row(product.node.name, product.weight.name, reason))
            else:
                chosen.append(product)
        return chosen

    def _left_out_of(self, convolutions: ConvScheme) -> list[str]:
        """What the options do not do to convolutions."""
        if not convolutions.products:
            return []
        notes = ["--gptq rounds MatMul and Gemm; convolutions are rounded to the nearest"] if self.gptq else []
        if self.exclude_worst:
            notes.append("--exclude-worst counts MatMul and Gemm: the output error of convolutions is not measured")
        return notes

    def _reason(self, product: Product, head: ir.Node | None) -> str:
        excluded = self.reason_excluded(product, head)
        if excluded:
            return excluded
        tensor = product.tensor
        if is_quantized(product):
            return "quantized already"
        if len(tensor.shape) != 2:
            return f"weight of rank {len(tensor.shape)}"
        if tensor.dtype not in COMPUTED:
            return f"type {tensor.dtype.name}"
        if product.obstacle:
            return product.obstacle
        if min(tensor.shape.numpy()) < _TOO_SMALL:
            return "K or N below 16"
        if self.form is INT4:
            size = int(tensor.shape.numpy()[product.axis])
            if self.block_size and size % self.block_size:
                raise UsageError(
                    f"quantize: --block-size {self.block_size} does not divide K = {size} of {product.weight.name!r}; "
                    "leave it out, or --exclude that weight"
                )
            if not block_size(size, self.block_size):
                return f"K = {size} is no multiple of 32"
        return ""

    def _behind_norms(self, groups: list[Group], table: list[dict[str, Any]], has_others: bool) -> list[Group]:
        foldable = [g for g in groups if g.fold is not None and g.fold.kind == "norm"]
        if not foldable and not has_others:
            raise JobError("no product reads the output of a norm alone; --all-layers quantizes all products")
        self._leave(
            table,
            [p for g in groups if g not in foldable for p in g.products],
            "not behind a norm (--all-layers takes it)",
        )
        return foldable

    def _leave(self, table: list[dict[str, Any]], products: Sequence[Product], reason: str) -> None:
        names = {product.node.name for product in products}
        for row in table:
            if row["layer"] in names:
                row["left"] = reason

    # --- calibration -------------------------------------------------------------------------------------------------

    def _calibrated(
        self, model: Model, facts: Facts, groups: list[Group], inner: Sequence[KvScheme | AttentionScheme | ConvScheme]
    ) -> tuple[Scheme, Findings]:
        blocks = (
            {p.node.name or "": block_size(g.channels, self.block_size) for g in groups for p in g.products}
            if self.form is INT4
            else {}
        )
        weights = frozenset(product.weight for g in groups for product in g.products)
        if self.kind == "int4-rtn" and not inner:
            return Int4Scheme(INT4, 0, None, weights, blocks), {}
        findings: Findings = {}
        with Calibration(model, self, key=repr(dataclasses.replace(self, exclude_worst=0))) as calibration:
            keep = calibration if self.gptq else None
            scheme = self._scheme(blocks, calibration.tokens, keep, weights, model, facts)
            by_node = {product.node: g for g in groups for product in g.products} if self.kind != "int4-rtn" else {}

            def look(layer: Layer) -> Findings:
                layer_groups = list(dict.fromkeys(by_node[p.node] for p in layer.products if p.node in by_node))
                values = {value for node in layer.segment.nodes for value in node.outputs}
                group_observers = scheme.watch(layer_groups)
                inner_observers = [inner_scheme.watch(values) for inner_scheme in inner]
                counts = {g.activation: (RowCount(),) for g in layer_groups}
                layer.observe(_together([group_observers, counts, *inner_observers]))  # type: ignore[list-item]
                seen = [g for g in layer_groups if counts[g.activation][0].count]
                findings = scheme.conclude(seen, group_observers)
                findings.update({f"{g.index}.{_UNSEEN}": np.array(1) for g in layer_groups if g not in seen})
                for inner_scheme, observers in zip(inner, inner_observers, strict=True):
                    findings.update(inner_scheme.conclude(observers))
                return findings

            nodes = {*by_node, *(node for other in inner for node in other.nodes)}
            for _, part in calibration.findings(look, nodes):
                findings.update(part)
        return scheme, findings

    def _scheme(
        self,
        blocks: dict[str, int],
        tokens: int,
        keep: Calibration | None,
        weights: frozenset[ir.Value],
        model: Model,
        facts: Facts,
    ) -> Scheme:
        if self.form is INT4:
            return Int4Scheme(
                INT4, tokens, keep, weights, blocks, unclipped=() if self.gptq else score_products(model, facts)
            )
        return LinearScheme(
            self.form, tokens, keep, weights, self.alpha, self.per_token, self.per_channel, self.calib_method
        )

    def _drop_worst(self, groups: list[Group], findings: Findings, table: list[dict[str, Any]]) -> None:
        """Put the errors into the table, and exclude the `exclude_worst` products with the largest error."""
        rows = {row["layer"]: row for row in table}
        for g in groups:
            for product in g.products:
                errors = findings.get(f"{g.index}.{product.node.name}")
                if errors is not None:
                    rows[product.node.name or ""].update(
                        snr_db=round(float(errors[0]), 2), error=round(float(errors[1]), 6)
                    )
        worst = sorted((row for row in table if row["error"] is not None), key=lambda row: -row["error"])[
            : self.exclude_worst
        ]
        for row in worst:
            row["left"] = f"among the {self.exclude_worst} worst (--exclude-worst)"

    # --- the graph ---------------------------------------------------------------------------------------------------

    def _write(
        self, groups: list[Group], findings: Findings, scheme: Scheme, table: list[dict[str, Any]], build: QdqBuilder
    ) -> None:
        rows = {row["layer"]: row for row in table}
        scheme.fold(groups, findings)
        for g in groups:
            products = tuple(p for p in g.products if not rows[p.node.name or ""]["left"])
            if not products:
                continue
            shown = scheme.emit(build, Group(g.index, g.activation, products, g.fold, g.dtype), findings)
            for name, scales in shown.items():
                rows[name].update(scheme=self._title(g), scale=scales)

    def _title(self, g: Group) -> str:
        if self.form is INT4:
            return f"INT4 W4A16, block {block_size(g.channels, self.block_size)}{', GPTQ' if self.gptq else ''}"
        parts = [
            f"{self.form.name} W8A8",
            "per channel" if self.per_channel else "",
            "per token" if self.per_token else "",
            "GPTQ" if self.gptq else "",
        ]
        return ", ".join(part for part in parts if part)

    def _notes(self, table: list[dict[str, Any]]) -> list[str]:
        quantized = [row for row in table if not row["left"]]
        notes = [*self.unmatched(table), f"{len(quantized)} of {len(table)} places quantized"]
        schemes = Counter(row["scheme"] for row in quantized)
        notes += [f"{count}: {scheme}" for scheme, count in schemes.items()]
        if self.form is INT4 and self.block_size is None and any("block 128" not in scheme for scheme in schemes):
            notes.append("smaller blocks where K is no multiple of 128")
        return notes + counts_left(table)


def _row(node: str | None, weight: str | None, left: str) -> dict[str, Any]:
    """One row of the result table, of a place that is left for now or for good."""
    row = {"layer": node or "", "weight": weight or "", "scheme": "", "scale": ""}
    return {**row, "snr_db": None, "error": None, "left": left}


def _nothing(model: Model, table: list[dict[str, Any]]) -> str:
    """Why a model has nothing to quantize, and what to do about it."""
    packed = Counter(node.op_type for node in model.graph if is_op(node, *_PACKED, domain="com.microsoft"))
    if packed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in packed.items())
        return f"{model.path}: its products are quantized already ({kinds}); start from the model in its own precision"
    if not table:
        return (
            f"{model.path}: has no MatMul, Gemm or Conv with a stored weight, so there is nothing to quantize; see it "
            "with `onnxtools inspect`"
        )
    return f"{model.path}: nothing is quantized: {'; '.join(counts_left(table))}"


_PACKED = ("MatMulNBits", "QMoE")
"""ONNX Runtime's operators with packed weights."""


def _together(parts: Sequence[dict[ir.Value, tuple[Observer, ...]]]) -> dict[ir.Value, tuple[Observer, ...]]:
    """The observers of each value, of all `parts` together."""
    whole: dict[ir.Value, tuple[Observer, ...]] = {}
    for part in parts:
        for value, observers in part.items():
            whole[value] = (*whole.get(value, ()), *observers)
    return whole


def _summary(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with one row for all layers whose names differ only in a number."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table:
        if not row["left"]:
            kinds.setdefault((re.sub(r"\d+", "*", row["layer"]), row["scheme"]), []).append(row)
    shown = []
    for (layer, scheme), rows in kinds.items():
        measured = [row for row in rows if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"]) if measured else None
        shown.append(
            {
                "layer": layer,
                "count": len(rows),
                "scheme": scheme,
                "SNR dB": f"{min(row['snr_db'] for row in measured):.1f}" if measured else "",
                "output error": f"{statistics.median(row['error'] for row in measured):.3f}" if measured else "",
                "worst": f"{worst['error']:.3f} {''.join(re.findall(r'[0-9]+', worst['layer'])[:1])}" if worst else "",
            }
        )
    return shown
