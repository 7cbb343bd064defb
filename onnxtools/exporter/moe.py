"""A mixture of experts in standard operators: each expert runs the rows of the tokens that chose it.

The T tokens make T x k choices. An expert gathers the rows of its choices (NonZero), so that the work is that of k MLPs
a token, and an expert's weights are ordinary weights of Gemm, which quantization and pruning know. The results stand in
the order of the experts; one Gather brings them back into the order of the choices.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxtools.exporter.config import Moe
from onnxtools.exporter.layers import FLOAT, Layers

_INT64 = ir.DataType.INT64


class Experts:
    """The mixture of experts of one layer; `weight` is its canonical name, `name` the prefix of its nodes."""

    def __init__(self, layers: Layers, moe: Moe, weight: str, name: str) -> None:
        self.layers, self.build, self.moe, self.weight, self.name = layers, layers.build, moe, weight, name

    def __call__(self, hidden: ir.Value) -> ir.Value:
        """[tokens, hidden] to [tokens, hidden]."""
        op, build, moe, name = self.layers.op, self.build, self.moe, self.name
        weights, chosen = self._route(hidden)
        choices = op("Reshape", [chosen, self._sizes(-1)], f"{name}/choices")
        results, places = [], []
        for e in range(moe.experts):
            result, place = self._expert(hidden, choices, e)
            results.append(result)
            places.append(place)
        ordered = op("Concat", results, f"{name}/experts", axis=0)
        place = op("Concat", places, f"{name}/places", axis=0)
        count = op("Squeeze", [op("Shape", [place], f"{name}/count")], f"{name}/count")
        zero, one = build.constant(np.array(0), "zero_0"), build.constant(np.array(1), "step")
        order = op("Range", [zero, count, one], f"{name}/order")
        inverse = op("ScatterElements", [place, place, order], f"{name}/inverse", axis=0)
        back = op("Gather", [ordered, inverse], f"{name}/back", axis=0)
        of_token = op("Reshape", [back, self._sizes(-1, moe.top_k, self.layers.config.hidden_size)], f"{name}/of_token")
        row = op(
            "Unsqueeze",
            [self.layers.cast(weights, self.layers.dtype, f"{name}/weights"), self._sizes(1)],
            f"{name}/row",
        )
        summed = op("MatMul", [row, of_token], f"{name}/sum")
        mixed = op("Reshape", [summed, self._sizes(-1, self.layers.config.hidden_size)], f"{name}/mixed")
        return mixed if moe.shared is None else op("Add", [mixed, self._shared(hidden)], name)

    def _sizes(self, *sizes: int) -> ir.Value:
        return self.build.constant(list(sizes), "sizes")

    def _expert(self, hidden: ir.Value, choices: ir.Value, e: int) -> tuple[ir.Value, ir.Value]:
        """The results of expert `e`, [n, hidden], and the places of its choices, int64 [n]."""
        op, name = self.layers.op, f"{self.name}/experts.{e}"
        hit = op("Equal", [choices, self.build.constant(np.array(e), f"expert_{e}")], name)
        place = op("Reshape", [op("NonZero", [hit], name), self._sizes(-1)], f"{name}/places")
        token = op("Div", [place, self.build.constant(np.array(self.moe.top_k), "top_k")], f"{name}/tokens")
        rows = op("Gather", [hidden, token], f"{name}/rows", axis=0)
        in_out = self.moe.in_out or self.layers.config.linear_in_out
        return self.layers.mlp(rows, self.moe.expert, f"{self.weight}.experts.{e}", name, in_out=in_out), place

    def _shared(self, hidden: ir.Value) -> ir.Value:
        assert self.moe.shared is not None
        y = self.layers.mlp(hidden, self.moe.shared, f"{self.weight}.shared_experts", f"{self.name}/shared_experts")
        if not self.moe.shared_gate:
            return y
        gate = self.layers.linear(
            hidden, f"{self.weight}.shared_expert_gate", f"{self.name}/shared_expert_gate", bias=False
        )
        share = self.layers.op("Sigmoid", [gate], f"{self.name}/shared_expert_gate")
        return self.layers.op("Mul", [y, share], f"{self.name}/shared")

    # --- the router --------------------------------------------------------------------------------------------------

    def _route(self, hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The weights and experts of each token, fp32 and int64 [tokens, top_k]; all in fp32, as near scores decide."""
        op, build, moe, name = self.layers.op, self.build, self.moe, f"{self.name}/gate"
        wide = self.layers.cast(hidden, FLOAT, name)
        inputs = [wide, self.layers.wide_weight(f"{self.weight}.gate.weight")]
        inputs += [self.layers.wide_weight(f"{self.weight}.gate.bias")] if moe.bias else []
        logits = op("Gemm", inputs, name, **({} if self.layers.config.linear_in_out else {"transB": 1}))
        scores = logits
        if moe.scores != "top_softmax":
            scores = (
                op("Softmax", [logits], name, axis=-1) if moe.scores == "softmax" else op("Sigmoid", [logits], name)
            )
        ranked = scores
        if moe.correction:
            correction = self.layers.wide_weight(f"{self.weight}.gate.e_score_correction_bias")
            ranked = op("Add", [scores, correction], f"{name}/corrected")
        if moe.groups > 1:
            ranked = self._in_groups(ranked, name)
        top, chosen = build.ops("TopK", [ranked, self._sizes(moe.top_k)], f"{name}/TopK", outputs=2, axis=-1)
        if moe.scores == "top_softmax":
            return op("Softmax", [top], f"{name}/weights", axis=-1), chosen
        if moe.correction:
            top = op("GatherElements", [scores, chosen], f"{name}/chosen", axis=-1)
        if moe.normalized:
            total = op("ReduceSum", [top, self._sizes(-1)], f"{name}/total", keepdims=1)
            if moe.scores == "sigmoid":  # as in DeepSeek-V3: all may be 0
                total = op("Add", [total, self.layers.scalar(1e-20, "tiny", FLOAT)], f"{name}/total")
            top = op("Div", [top, total], f"{name}/normalized")
        if moe.scale != 1:
            top = op("Mul", [top, self.layers.scalar(moe.scale, "routed_scale", FLOAT)], f"{name}/scaled")
        return top, chosen

    def _in_groups(self, scores: ir.Value, name: str) -> ir.Value:
        """`scores` [tokens, experts] with the lowest number for experts outside the groups with the best scores."""
        op, build, moe = self.layers.op, self.build, self.moe
        each = moe.experts // moe.groups
        grouped = op("Reshape", [scores, self._sizes(-1, moe.groups, each)], f"{name}/groups")
        best = build.ops(
            "TopK",
            [grouped, self._sizes(1 if moe.group_score == "max" else 2)],
            f"{name}/best/TopK",
            outputs=2,
            axis=-1,
        )[0]
        of_group = op("ReduceSum", [best, self._sizes(-1)], f"{name}/group_scores", keepdims=0)
        inputs = [of_group, self._sizes(moe.top_groups)]
        groups = build.ops("TopK", inputs, f"{name}/top_groups/TopK", outputs=2, axis=-1)[1]
        numbers = build.constant(np.arange(moe.groups).reshape(1, 1, -1), "group_numbers")
        hits = op("Equal", [op("Unsqueeze", [groups, self._sizes(-1)], f"{name}/groups"), numbers], f"{name}/hits")
        counts = op(
            "ReduceMax",
            [op("Cast", [hits], f"{name}/hits", to=FLOAT.value), self._sizes(1)],
            f"{name}/open",
            keepdims=0,
        )
        is_open = op("Cast", [counts], f"{name}/open", to=ir.DataType.BOOL.value)
        is_open = op("Unsqueeze", [is_open, self._sizes(-1)], f"{name}/open")
        low = self.layers.scalar(0.0 if moe.scores == "softmax" else -3e38, "closed", FLOAT)
        masked = op("Where", [is_open, grouped, low], f"{name}/in_groups")
        return op("Reshape", [masked, self._sizes(-1, moe.experts)], f"{name}/in_groups")
