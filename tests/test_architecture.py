"""The floors of the house: imports run downward, and the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rice_eval"

# From the top; a room may import from its own floor and from floors below it.
FLOORS: list[set[str]] = [
    {"cli"},
    {"demo", "suite", "sweep", "watch", "ocr_reference"},
    {"cluster"},
    {"mllm_run"},
    {"run", "plan", "preview", "publish", "pictures"},
    {"openmmlab"},
    {"protocols"},
    {"bank", "mllm"},
    {"datasets", "adapters"},
    {"report"},
    {"results"},
    {"cards", "views", "registry", "environment", "progress"},
    {"metrics", "probes", "errors"},
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    lazy = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in lazy:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rice_eval."):
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.module == "rice_eval":
            found.update(f"rice_eval.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("rice_eval."))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in LEVEL, f"{room} stands on no floor: add it to FLOORS"
    for module in imports(path):
        if room_of(module) in {"RiceEvalError", "evaluate", "load_encoder"}:
            continue
        assert LEVEL[room_of(module)] >= LEVEL[room], f"{path} imports {module} from a floor above"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "encoders"], ["segmentation", "--help"], ["gate", "--help"]]
)
def test_light_commands_do_not_import_torch(arguments: list[str]):
    code = (
        "import sys\n"
        "from rice_eval.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'timm', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    code = "import sys, rice_eval; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_test_files_have_names_of_their_own():
    # Test folders are no packages, so that two files of one name would hide each other.
    names = [p.name for p in Path(__file__).parent.rglob("test_*.py") if not (p.parent / "__init__.py").exists()]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
