"""INT4 weights by a pass, what they change, and what the model says afterwards."""

import sys
from pathlib import Path

import onnxtools


def main(folder: Path) -> None:
    sizes = onnxtools.ExportOptions(
        random=True, family="llama", n_layer=2, n_embd=64, n_head=4, n_inner=128, vocab_size=256, dtype="fp32"
    )
    onnxtools.export(None, folder / "model.onnx", sizes)

    model = onnxtools.load(folder / "model.onnx")
    quantize = onnxtools.load_pass("quantize").from_options({"scheme": "int4-rtn"})
    report = onnxtools.PassManager([quantize]).run(model)
    model.save(folder / "int4.onnx", copy_weights=True)
    print(report.steps[-1].result.notes[0])

    verdict = onnxtools.validate(
        onnxtools.load(folder / "model.onnx"), onnxtools.load(folder / "int4.onnx"), tolerance=1.0
    )
    print(f"largest difference of the logits: {max(row.difference.rel_l2 for row in verdict.rows):.3f} (relative L2)")

    runtime = onnxtools.open_runtime("onnxrt", folder / "int4.onnx", onnxtools.RuntimeOptions(device="cpu"))
    found = onnxtools.generate(runtime, [[1, 2, 3]], onnxtools.GenerationOptions(max_new_tokens=8, ignore_eos=True))
    print("8 tokens after the prompt:", found[0][0].token_ids)
    runtime.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
