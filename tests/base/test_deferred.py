import subprocess
import sys


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_sympy_is_imported_when_a_dimension_is_computed_with() -> None:
    code = "import sys, onnxtools.cli, onnxtools.ir.model, onnx_ir;"
    code += (
        "print('sympy.core' in sys.modules); print(onnx_ir.SymbolicDim('n') * 2); print('sympy.core' in sys.modules)"
    )
    assert python(code).split() == ["False", "2*n", "True"]


def test_sympy_is_itself_for_others() -> None:
    assert python(
        "import onnxtools.cli, sympy.core.expr; import sympy; print(sympy.sympify('x + x'), sympy.__version__ == "
        "sympy.release.__version__)"
    ) == ("2*x True")
    assert (
        python(
            "import sympy; before = sympy; import onnxtools.cli, sympy; print(sympy is before, type(sympy).__name__)"
        )
        == "True module"
    )
    assert (
        python("import onnx_ir, onnxtools.cli; import onnx_ir._symbolic_shapes as s; print(type(s).__name__)")
        == "module"
    )


def test_the_library_changes_nothing_outside_itself() -> None:
    """Only the command line defers: a program that imports the library has its modules, environment and folder as they
    were.
    """
    code = (
        "import os, sys; before = dict(os.environ), os.getcwd(); import onnxtools; onnxtools.load, "
        "onnxtools.PassManager, onnxtools.generate;"
        "print(type(sys.modules.get('sympy', sys)).__name__, before == (dict(os.environ), os.getcwd()))"
    )
    assert python(code) == "module True"


def test_a_module_that_is_not_there_is_still_missed() -> None:
    code = "from onnxtools.base.deferred import defer; defer('no_such_module'); import no_such_module"
    assert "ModuleNotFoundError" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
