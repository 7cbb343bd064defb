"""Checks whether a transformed model still computes the same.

It compares full runs and incremental decoding, and finds the first value that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import CacheSpec, cache_inputs, is_present
from onnxtools.analysis.facts import dim_terms, token_input
from onnxtools.base.errors import JobError
from onnxtools.check.feeds import OWN_INPUTS, Array, Feeds, Probe, in_types_of, long_probe, probes, sizes_of, too_costly
from onnxtools.check.runner import Runner
from onnxtools.ir.model import Model
from onnxtools.ir.query import has_dynamic_scales

FP8_TOLERANCE = 0.1
"""FP8 rounds to 3 bits of fraction: one flipped rounding is 6% of a value."""
STEP_TOLERANCE = 0.25
"""For steps of a model whose quantization scales are computed from the data: another scale flips many roundings."""
LAYER_BUDGET = 256 << 20
"""Bytes of inner values in memory at once while the first divergent one is searched."""


@dataclass(frozen=True)
class Difference:
    """How far `b` is from the reference `a`, over all elements.

    Attributes:
        max_abs: largest |a - b|.
        rel_l2: ||a - b|| / ||a||.
        cosine: cosine of the angle between the flattened tensors; 1 is the same direction.
    """

    max_abs: float
    rel_l2: float
    cosine: float

    @classmethod
    def of(cls, a: Array, b: Array) -> Difference:
        """Compares two arrays of the same shape, in float64.

        Infinite and NaN elements of `a` are left out if `b` has the same ones; else the difference is infinite. Texts
        are equal or infinitely different.
        """
        if np.asarray(a).dtype.kind in "OSU":  # strings
            return cls(0.0, 0.0, 1.0) if np.array_equal(a, b) else cls(float("inf"), float("inf"), 0.0)
        x, y = (np.asarray(t).astype(np.float64).ravel() for t in (a, b))
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            return cls(float("inf"), float("inf"), 0.0)
        x, y = x[finite], y[finite]
        if not x.size:
            return cls(0.0, 0.0, 1.0)
        delta, norm_x, norm_y = np.abs(x - y), float(np.linalg.norm(x)), float(np.linalg.norm(y))
        error = float(np.linalg.norm(delta))
        relative = error / norm_x if norm_x else (0.0 if error == 0 else float("inf"))
        product = norm_x * norm_y
        return cls(float(delta.max()), relative, float(x @ y / product) if product else float(error == 0))


@dataclass
class Row:
    """One comparison.

    Attributes:
        check: the run that was compared, for reports.
        output: name of the output.
        difference: its difference from the reference.
        passed: whether the difference is within the tolerance.
    """

    check: str
    output: str
    difference: Difference
    passed: bool


@dataclass
class Verdict:
    """All comparisons of one validation.

    Attributes:
        tolerance: largest accepted relative L2.
        rows: the comparisons.
        notes: remarks for the user, a line each.
    """

    tolerance: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are comparisons and all of them passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def add(self, check: str, output: str, a: Array, b: Array, tolerance: float | None = None) -> None:
        """Compare `b` with the reference `a` and add a row.

        Args:
            check: the run, for reports.
            output: name of the output.
            a: output of the reference.
            b: output of the model.
            tolerance: largest accepted relative L2, in place of the verdict's.

        Raises:
            JobError: the shapes differ.
        """
        if a.shape != b.shape:
            raise JobError(
                f"output {output!r} has the shape {list(b.shape)}, the reference {list(a.shape)}; compare models with "
                "the same inputs"
            )
        difference = Difference.of(a, b)
        limit = self.tolerance if tolerance is None else tolerance
        # Infinities may hide tokens and pad vocabularies. An output without any finite element is damaged.
        damaged = (
            a.size > 0
            and a.dtype.kind in "fV"
            and not np.isfinite(a if a.dtype.kind == "f" else a.astype(np.float32)).any()
        )
        if (
            damaged
            and (note := f"warning: {output!r} of the reference is NaN or infinite; look for a damaged weight")
            not in self.notes
        ):
            self.notes.append(note)
        self.rows.append(Row(check, output, difference, difference.rel_l2 <= limit and not damaged))

    def as_json(self) -> dict[str, Any]:
        """Returns the verdict as plain data."""
        rows = [{"check": r.check, "output": r.output, **asdict(r.difference), "passed": r.passed} for r in self.rows]
        return {"passed": self.passed, "tolerance": self.tolerance, "rows": rows, "notes": self.notes}


def default_tolerance(model: Model) -> float:
    """Returns the relative L2 that rounding alone may cause.

    It is 1e-5 for float32, 1e-2 for float16, and 0.1 for bfloat16, for float16 graphs with FP8 and for FP8 caches. FP8
    rounds to 3 bits of fraction, so one 16-bit rounding before it can change a value by 6%. Over a few layers this
    adds up to some percent.
    """
    types = {tensor.dtype for _, tensor in model.weights()}
    types |= {value.dtype for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype is not None}
    half = ir.DataType.FLOAT16 in types
    fp8_cache = any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in cache_inputs(model))
    if ir.DataType.BFLOAT16 in types or fp8_cache or (half and has_fp8(model)):
        return FP8_TOLERANCE
    return 1e-2 if half else 1e-5


def has_fp8(model: Model) -> bool:
    """Whether `model` has TransformerEngine's operators in its main graph, or FP8 E4M3 or E8M0 weights."""
    fp8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E8M0)
    return any(n.domain == "trt" for n in model.graph) or any(t.dtype in fp8 for _, t in model.weights())


def is_cached(model: Model) -> bool:
    """Whether `model` has a KV cache."""
    return bool(cache_inputs(model))


@dataclass(frozen=True)
class RandomInputs:
    """Sizes of the inputs that a comparison makes up.

    Attributes:
        batch: rows.
        sequence: tokens of a row.
        seed: seed of the random numbers.
    """

    batch: int = 2
    sequence: int = 16
    seed: int = 0


def validate(
    reference: Model,
    model: Model,
    feeds: Feeds | None = None,
    tolerance: float | None = None,
    random: RandomInputs | None = None,
) -> Verdict:
    """Compare `model` with `reference` on the same inputs. A model with a KV cache is also decoded in several steps.

    Args:
        reference: the model before the transform.
        model: the transformed model.
        feeds: inputs of the reference (full sequence), arrays by name; random by rule when None.
        tolerance: largest accepted relative L2; by element type when None.
        random: sizes and seed of random inputs; 2 rows of 16 tokens when None.

    Raises:
        JobError: a model does not run, the models share no output, or an output's shape differs.
    """
    verdict = Verdict(
        tolerance if tolerance is not None else max(default_tolerance(reference), default_tolerance(model))
    )
    run_a, run_b = Runner(reference), Runner(model)
    verdict.notes = list(dict.fromkeys([*run_a.notes, *run_b.notes]))
    steps_tolerance = None
    if is_cached(model) and has_dynamic_scales(model) and tolerance is None:
        steps_tolerance = STEP_TOLERANCE
        verdict.notes.append(
            "scales are computed from the data (current scaling): a step sees fewer tokens than the full run, so "
            f"steps may differ by {STEP_TOLERANCE:g}"
        )
    random = random or RandomInputs()
    for probe in [Probe("", feeds)] if feeds is not None else _probes(reference, random, verdict.notes):
        try:
            expected = run_a(_with_empty_cache(reference, probe.feeds))
        except JobError as error:
            if not probe.title and feeds is None:
                raise JobError(f"{error}; {OWN_INPUTS}") from error
            if not probe.title:
                raise
            verdict.notes.append(f"not compared: {probe.title} (the reference does not run: {error})")
            continue
        typed = replace(probe, feeds=in_types_of(model, probe.feeds))
        if is_cached(model):
            outputs = {name: array for name, array in expected.items() if not is_present(name)}
            reference_steps = (
                (lambda steps, feeds=probe.feeds: decode(reference, run_a, feeds, steps))
                if is_cached(reference)
                else None
            )
            _validate_decoding(verdict, outputs, model, run_b, typed, steps_tolerance, reference_steps)
        else:
            _compare(verdict, probe.title or "full", expected, run_b(typed.feeds), probe)
    if not verdict.passed and is_quantized(model) and not is_quantized(reference):
        verdict.notes.append(
            "only the model is quantized: percents of difference are its rounding; `onnxtools accuracy --compare` says "
            "what it costs"
        )
    return verdict


RunsRank = Callable[[Feeds], Mapping[str, Array]]
"""Runs the graph of one rank: its inputs by name to its outputs by name."""


def validate_ranks(
    reference: Model,
    ranks: Sequence[Model],
    compute: Callable[[Sequence[RunsRank], Feeds], Mapping[str, Array]],
    feeds: Feeds | None = None,
    tolerance: float | None = None,
) -> Verdict:
    """Compare the common result of the ranks of a partitioned model with `reference`, in full runs.

    Args:
        reference: the model before the partition.
        ranks: the graphs of the ranks.
        compute: runs the ranks together (`Partition.compute`).
        feeds: inputs of the reference; random by rule when None.
        tolerance: largest accepted relative L2; by element type when None.

    Raises:
        JobError: a graph does not run, the models share no output, or an output's shape differs.
    """
    verdict = Verdict(default_tolerance(reference) if tolerance is None else tolerance)
    run, runs = Runner(reference), [Runner(rank) for rank in ranks]
    cases, verdict.notes = ([Probe("", feeds)], []) if feeds is not None else probes(reference)
    verdict.notes += dict.fromkeys(note for runner in (run, *runs) for note in runner.notes)
    for probe in cases:
        complete = _with_empty_cache(reference, probe.feeds)
        _compare(verdict, probe.title or "ranks", run(complete), compute(runs, complete), probe)
    return verdict


def _probes(model: Model, random: RandomInputs, notes: list[str]) -> list[Probe]:
    """Returns all inputs by rule, and the long one if it is cheap enough. Adds notes on the others to `notes`."""
    all_probes, probe_notes = probes(model, random.batch, random.sequence, random.seed)
    notes += probe_notes
    far = long_probe(model, random.seed)
    if far is not None and not (why := too_costly(model, far.feeds)):
        all_probes.append(far)
    elif far is not None:
        notes.append(f"not compared: {far.title} ({why}); `--sequence` makes the inputs longer")
    return all_probes


def is_quantized(model: Model) -> bool:
    """Whether the main graph has a DequantizeLinear (TransformerEngine's included) or MatMulNBits."""
    return any(node.op_type.endswith(("DequantizeLinear", "MatMulNBits")) for node in model.graph)


def _compare(
    verdict: Verdict,
    check: str,
    expected: Mapping[str, Array],
    actual: Mapping[str, Array],
    probe: Probe,
    tolerance: float | None = None,
) -> None:
    """Add one row for each shared output, and a note on the outputs that only one model has."""
    shared = [name for name in expected if name in actual]
    if not shared:
        raise JobError(f"the models share no output: {', '.join(expected)} against {', '.join(actual)}")
    for name in shared:
        verdict.add(check, name, probe.of_real(expected[name]), probe.of_real(actual[name]), tolerance)
    for owner, mine, other in (("the reference", expected, actual), ("the model", actual, expected)):
        lonely = [name for name in mine if name not in other]
        note = f"warning: only {owner} has {', '.join(map(repr, lonely))}; not compared"
        if lonely and note not in verdict.notes:
            verdict.notes.append(note)


def run_once(model: Model, feeds: Feeds) -> Feeds:
    """Runs the model on ONNX Runtime, with an empty cache if it has one, and returns the outputs by name.

    Args:
        model: the model.
        feeds: arrays by input name; cache inputs are not needed.

    Raises:
        JobError: the model does not run on these inputs.
    """
    return Runner(model)(_with_empty_cache(model, feeds))


def _with_empty_cache(model: Model, feeds: Feeds) -> Feeds:
    caches = cache_inputs(model)
    return {**feeds, **empty_cache(model, _token_shape(model, feeds)[0])} if caches else feeds


def empty_cache(model: Model, batch: int) -> Feeds:
    """Returns cache inputs of length 0 for `batch` rows, arrays by name; {} for a model without a cache.

    A cache of fixed length has all its slots, filled with zeros.
    """
    spec = CacheSpec.find(model)
    return spec.feeds(batch) if spec is not None else {}


def _token_shape(model: Model, feeds: Mapping[str, Array]) -> tuple[int, int]:
    tokens = token_input(model)
    if tokens is not None and tokens.value.name in feeds:
        shape = feeds[tokens.value.name or ""].shape
        return int(shape[tokens.batch_axis]), int(shape[tokens.axis])
    raise JobError("no input of shape [batch, sequence] was found to decode step by step; validate without a cache")


def split_points(sequence: int) -> list[list[int]]:
    """Returns ways to cut `sequence` tokens into steps: all at once, one by one, prefill then steps, uneven chunks."""
    ways = [
        [sequence],
        [1] * sequence,
        [sequence - 1, 1],
        [sequence // 2] + [1] * (sequence - sequence // 2),
        [1, sequence // 3, sequence - 1 - sequence // 3],
    ]
    unique: list[list[int]] = []
    for way in ways:
        way = [step for step in way if step > 0]
        if sum(way) == sequence and way not in unique:
            unique.append(way)
    return unique


def decode(model: Model, run: Runner, feeds: Feeds, steps: Sequence[int]) -> dict[str, Array]:
    """Run the model in steps and carry its cache from step to step.

    Args:
        model: the model of `run`.
        run: runs the model.
        feeds: inputs of the full sequence, arrays by name; the cache starts empty.
        steps: tokens of each step.

    Returns:
        Outputs other than the cache, by name. Those with an axis for the new tokens are joined along it; of others the
        last step's.

    Raises:
        JobError: the model does not run, a cache input has no output, or there is no input of token ids.
    """
    batch, _ = _token_shape(model, feeds)
    spec = CacheSpec.find(model) or CacheSpec()
    cache, carried = spec.feeds(batch), spec.carried()
    pieces: dict[str, list[Array]] = {}
    done = 0
    for step in steps:
        results = run(
            {
                **{name: _part(name, array, model, done, step) for name, array in feeds.items() if name in run.inputs},
                **cache,
            }
        )
        for tensor, present in carried:
            new = results[present]
            cache[tensor.past] = _joined(cache[tensor.past], new, tensor.axis) if spec.policy == "new" else new
        for name, array in results.items():
            if not is_present(name):
                pieces.setdefault(name, []).append(array)
        done += step
    axes = {name: _sequence_axis(model, name) for name in pieces}
    return {
        name: parts[-1] if axes[name] is None else np.concatenate(parts, axis=axes[name])
        for name, parts in pieces.items()
    }


def _sequence_axis(model: Model, output: str) -> int | None:
    """Returns the axis of an output along which the steps are joined.

    It is None if each step replaces the output of the previous one (logits of the last token).
    """
    value = next(v for v in model.graph.outputs if v.name == output)
    names = [d.value if isinstance(d, ir.SymbolicDim) else None for d in value.shape or ()]
    if (new := _new_tokens(model)) in names:
        return names.index(new)
    return None if value.shape is not None and len(value.shape) > 1 and isinstance(value.shape[1], int) else 1


def _new_tokens(model: Model) -> str:
    """Returns the name of the dimension of new tokens."""
    tokens = token_input(model)
    dim = tokens.value.shape[tokens.axis] if tokens is not None and tokens.value.shape is not None else None
    return dim.value or "sequence" if isinstance(dim, ir.SymbolicDim) else "sequence"


def _joined(old: Array, new: Array, axis: int) -> Array:
    """Concatenates along `axis`. FP8 is joined as bytes, since numpy cannot join it."""
    bytes_ = new.dtype.itemsize == 1
    parts = [old.view(np.uint8), new.view(np.uint8)] if bytes_ else [old, new]
    return np.concatenate(parts, axis).view(new.dtype)


def _part(name: str, array: Array, model: Model, done: int, step: int) -> Array:
    """Returns the part of a full-sequence input for one step: the new tokens, or all tokens so far for a mask."""
    value, new = next(v for v in model.graph.inputs if v.name == name), _new_tokens(model)
    index: list[slice] = []
    for dim in value.shape or ():
        text = dim.value or "" if isinstance(dim, ir.SymbolicDim) else ""
        if "total" in text or len(dim_terms(text)) > 1:
            index.append(slice(0, done + step))
        elif text == new:
            index.append(slice(done, done + step))
        else:
            index.append(slice(None))
    return array[tuple(index)]


def _validate_decoding(
    verdict: Verdict,
    expected: Mapping[str, Array],
    model: Model,
    run: Runner,
    probe: Probe,
    tolerance: float | None,
    reference_steps: Callable[[Sequence[int]], Mapping[str, Array]] | None,
) -> None:
    """Compare runs at once and in steps: in all ways of `split_points` on the plain inputs, in one way on others.

    Args:
        expected: outputs of the reference in a full run.
        tolerance: for runs in steps, in place of the verdict's.
        reference_steps: runs a reference with a cache in the same steps. If neither its steps nor the model's agree
            with its full run (its attention is not causal), the steps of both must agree.
    """
    rows, sequence = _token_shape(model, probe.feeds)
    ways = [[sequence], [sequence - 1, 1]] if probe.title and sequence > 1 else split_points(sequence)
    if rows > 1 and (spec := CacheSpec.find(model)) is not None and spec.kind == "gqa":
        # ONNX Runtime's operator takes several tokens behind a cache for one row alone.
        kept = [steps for steps in ways if max(steps[1:], default=1) == 1]
        note = "GroupQueryAttention takes several tokens behind a cache for one row: --batch 1 compares such steps too"
        verdict.notes += [note] if kept != ways and note not in verdict.notes else []
        ways = kept
    for steps in ways:
        label = "prefill" if len(steps) == 1 else f"steps {_brief(steps)}"
        label = f"{probe.title}: {label}" if probe.title else label
        limit = tolerance if tolerance is not None and len(steps) > 1 else verdict.tolerance
        actual, target = decode(model, run, probe.feeds, steps), expected
        if reference_steps is not None and len(steps) > 1 and not _worst(expected, actual, probe) <= limit:
            reference_outputs = reference_steps(steps)
            if not _worst(expected, reference_outputs, probe) <= limit:
                target = reference_outputs
                note = (
                    "the reference's own steps differ from its full run (its attention is not causal?): they are what "
                    "the model's are compared with"
                )
                verdict.notes += [note] if note not in verdict.notes else []
        _compare(verdict, label, target, actual, probe, tolerance if len(steps) > 1 else None)


def _worst(a: Mapping[str, Array], b: Mapping[str, Array], probe: Probe) -> float:
    """Returns the largest relative L2 of the shared outputs of equal shape, over the real tokens of `probe`."""
    both = [name for name in a if name in b and a[name].shape == b[name].shape]
    return max((Difference.of(probe.of_real(a[name]), probe.of_real(b[name])).rel_l2 for name in both), default=0.0)


def _brief(steps: Sequence[int]) -> str:
    if all(step == 1 for step in steps):
        return f"1 x {len(steps)}"
    return "+".join(map(str, steps)) if len(steps) <= 4 else f"{steps[0]}+1 x {len(steps) - 1}"


# --- first divergence -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """The first shared value that differs.

    Attributes:
        value: its name.
        node: name of the node that computes it in the second model.
        op_type: operator of the node.
        difference: the difference from the reference.
        compared: values compared so far, this one included.
    """

    value: str
    node: str
    op_type: str
    difference: Difference
    compared: int


def first_divergence(reference: Model, model: Model, feeds: Feeds, tolerance: float) -> Divergence | None:
    """Compare the values that have the same name in both graphs, in order, a bounded number of bytes at a time.

    Only the values of one group are outputs at once. ONNX Runtime frees other values as soon as it can, so memory for
    values stays near `LAYER_BUDGET`, and the graph stays as fused as it can be.

    Args:
        reference: the model before the transform.
        model: the transformed model.
        feeds: inputs of the reference, arrays by name.
        tolerance: largest accepted relative L2.

    Returns:
        The first value whose difference is larger; None if there is none.

    Raises:
        JobError: a graph does not run.
    """
    from onnxtools.analysis.facts import analyse

    facts = analyse(reference, sizes_of(reference, feeds))
    reference_names = {v.name for node in reference.graph for v in node.outputs if v.name}
    names = [(v.name, node) for node in model.graph for v in node.outputs if v.name in reference_names and v.name]
    shapes = {v.name: facts[v] for node in reference.graph for v in node.outputs}
    compared = 0
    model_feeds = in_types_of(model, _with_empty_cache(model, feeds))
    for group in _groups(names, shapes):
        group_names = [name for name, _ in group]
        a = Runner(reference, only=group_names)(feeds)
        b = Runner(model, only=group_names)(model_feeds)
        for name, node in group:
            compared += 1
            if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype or a[name].dtype.kind not in "fVb":
                continue
            difference = Difference.of(a[name], b[name])
            if difference.rel_l2 > tolerance:
                return Divergence(name, node.name or "", node.op_type, difference, compared)
    return None


def _groups(names: list[tuple[str, ir.Node]], shapes: Mapping[str | None, Any]) -> Iterator[list[tuple[str, ir.Node]]]:
    group: list[tuple[str, ir.Node]] = []
    size = 0
    for name, node in names:
        fact = shapes[name]
        nbytes = int(np.prod(fact.shape, dtype=np.int64)) * 4 if fact.shape is not None else 0
        if group and (size + nbytes > LAYER_BUDGET or len(group) >= 32):
            yield group
            group, size = [], 0
        group.append((name, node))
        size += nbytes
    if group:
        yield group
