"""The rules of the house: which room imports which, what no file is called, and how the package lives beside others."""

import ast
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.version import Version

import kernels

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "training_runs": {"kernels"},
    "vision": {"kernels", "training_runs"},
    "generation": {"kernels", "training_runs"},
    "multimodal": {"kernels", "training_runs"},
    "demos": {"kernels", "training_runs", "vision", "generation", "multimodal"},
    "configs": set(),
}
OUTSIDE_OF_KERNELS = {"torch", "triton"}  # triton only by way of a function: see LAZY
LAZY = re.compile(r"^triton(\.|$)|^kernels(\.\w+)+\.triton(_kernels)?$")
DUMPING_GROUNDS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
SOURCES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
TEXT = {".py", ".md", ".yaml", ".toml", ".txt", ".cpp", ".h", ".json", ".csv"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|work|mnt)/\w")


def modules_imported(source: str) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import in `source`, `from a import b` as a and a.b."""
    tree = ast.parse(source)
    in_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        at_import = id(node) not in in_functions
        if isinstance(node, ast.Import):
            found += [(alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append((node.module, at_import))
            found += [(f"{node.module}.{alias.name}", at_import) for alias in node.names]
    return found


def forbidden_imports(module: str, source: str) -> set[str]:
    """What `source`, the text of the file `module`, imports against the rules."""
    room = module.split(".")[0]
    forbidden = set()
    for imported, at_import in modules_imported(source):
        package = imported.split(".")[0]
        if package in MAY_IMPORT or package == "tests":
            allowed = package == room or package in MAY_IMPORT[room]
        else:
            allowed = room != "kernels" or package in OUTSIDE_OF_KERNELS or package in sys.stdlib_module_names
        if room == "kernels" and at_import and LAZY.match(imported) and not LAZY.match(module):
            allowed = False
        if not allowed:
            forbidden.add(imported)
    return forbidden


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_downwards(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert forbidden_imports(module, path.read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("kernels.new", "import torch, math\nimport kernels.backend", set()),
        ("kernels.new", "import numpy as np", {"numpy"}),
        ("kernels.new", "def f():\n    import vision.vig", {"vision.vig"}),
        ("kernels.new", "import triton", {"triton"}),
        ("kernels.new", "def f():\n    import triton", set()),
        ("kernels.new.triton", "import triton.language as tl", set()),
        ("kernels.new", "from kernels.gated_scan import triton", {"kernels.gated_scan.triton"}),
        ("kernels.new", "def f():\n    from kernels.gated_scan import triton", set()),
        ("vision.new", "from kernels import swiglu\nimport numpy", set()),
        ("vision.new", "from generation import lina", {"generation", "generation.lina"}),
        ("multimodal.new", "import vision", {"vision"}),
        ("demos.new", "import vision, generation, multimodal", set()),
        ("demos.new", "from tests.kernels import scan_cases", {"tests.kernels", "tests.kernels.scan_cases"}),
    ],
    ids=lambda value: value.replace("\n", ";") if isinstance(value, str) else "",
)
def test_the_rule_of_imports_sees_what_it_should(module, source, forbidden):
    assert forbidden_imports(module, source) == forbidden


@pytest.mark.parametrize("room", [*MAY_IMPORT, "tests"])
def test_no_file_is_a_dumping_ground(room):
    names = [path for path in (ROOT / room).rglob("*.py") if path.stem.strip("_") in DUMPING_GROUNDS]
    assert names == []


def test_no_file_holds_a_path_of_a_machine():
    folders = [ROOT / name for name in (*MAY_IMPORT, "tests", "docs", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    texts = {path: path.read_text() for path in files if path.suffix in TEXT or path.name in ("Makefile", "run")}
    assert len(texts) > len(SOURCES)
    found = {path.name: match[0] for path, text in texts.items() if (match := MACHINE_PATH.search(text))}
    assert found == {}


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter whose search path begins with `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=path[0])


def test_version_is_none_that_transformers_takes_for_the_other_kernels():
    version = Version(kernels.__version__)
    assert version < Version("0.9") or version.major >= 2000


def test_importing_kernels_is_light():
    done = python("import sys, kernels; print(*{'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules))", ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_scan_on_cpu_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels.gated_scan, kernels.fused_layers, kernels.backend"
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr


def test_transformers_and_diffusers_import_beside_our_kernels():
    import diffusers
    import transformers

    assert not transformers.utils.is_kernels_available()
    assert transformers.BertModel.__module__.startswith("transformers.")
    assert diffusers.UNet2DModel.__module__.startswith("diffusers.")


@pytest.mark.parametrize(
    "room", [room for room in ("vision", "generation", "multimodal") if (ROOT / room / "__init__.py").is_file()]
)
def test_a_foreign_kernels_package_is_named(room, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.12.0'\n")
    done = python(f"import {room}", tmp_path, ROOT)
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert str(tmp_path / "kernels" / "__init__.py") in last_line
    assert "pip uninstall kernels" in last_line


@pytest.mark.parametrize("name", kernels.__all__)
def test_public_name_of_kernels(name):
    """It resolves, is listed, and is no submodule's: importing that submodule would replace it."""
    assert name in dir(kernels)
    assert name not in {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    value = getattr(kernels, name)
    if callable(value):
        assert value is getattr(import_module(value.__module__), name)
        assert value.__doc__


def test_unknown_name_of_kernels_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        kernels.flash  # noqa: B018
