"""From weights to an engine: export, a KV cache by a pass, validation step by step, and TensorRT-RTX for a GPU that
need not be here.
"""

import sys
from pathlib import Path

import onnxtools


def main(folder: Path) -> None:
    # A folder, .nemo, .ckpt or .gguf would be the first argument; random weights need none.
    sizes = onnxtools.ExportOptions(
        random=True,
        family="llama",
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_kv_head=2,
        n_inner=128,
        vocab_size=256,
        kv_cache="none",
    )
    exported = onnxtools.export(None, folder / "full.onnx", sizes)
    print("wrote", exported.saved.path.name)

    model = onnxtools.load(folder / "full.onnx")
    onnxtools.PassManager([onnxtools.load_pass("add-kv-cache")()]).run(model)
    model.save(folder / "model.onnx")

    verdict = onnxtools.validate(onnxtools.load(folder / "full.onnx"), onnxtools.load(folder / "model.onnx"))
    print("full run and step-by-step decoding agree" if verdict.passed else "they differ")

    engine = onnxtools.build(
        folder / "model.onnx",
        folder / "model.engine",
        onnxtools.EngineSpec(compute_capability=("8.9",), max_seq_len=128),
    )
    print(
        "built",
        engine.path.name,
        "with profiles",
        ", ".join(profile["name"] for profile in engine.manifest["profiles"]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
