"""Who may import whom. The rules are in the docstring of `violations`; a stranger can then read any folder alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("services", "shared", "tools", "tests")
HEAVY = ("zmq", "uvloop", "cupy", "ik_llama_cpp", "tokenizers", "uvicorn", "starlette", "structlog")
CUPY_FOLDERS = ("shared/kernels/", "shared/engine/cuda/")


def imported(source: str, package: str) -> Iterator[str]:
    """The dotted names that a module's source imports, also inside functions; `package` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # `from services import router` imports a module of that name, `from shared.wire import encode` does not.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    """What breaks the rules under `root`.

    A service imports itself and `shared`; `shared` imports only `shared`; `tools` imports `tools` and `shared`; only
    shared/kernels and shared/engine/cuda import cupy; shared/messages.py imports nothing heavy, not even through
    modules of ours.
    """
    found: list[str] = []
    imports: dict[str, set[str]] = {}
    for path in sorted(p for top in ("services", "shared", "tools") for p in (root / top).rglob("*.py")):
        place = path.relative_to(root).as_posix()
        module = place.removesuffix(".py").replace("/", ".")
        package = module.rpartition(".")[0]
        names = set(imported(path.read_text("utf-8"), package))
        imports[module.removesuffix(".__init__")] = names
        top = place.split("/")[0]
        allowed = ["shared"] if top != "tools" else ["shared", "tools"]
        if top == "services" and place.count("/") > 1:
            allowed.append(".".join(package.split(".")[:2]))
        for name in names:
            if name.split(".")[0] in OURS and not any(name == a or name.startswith(a + ".") for a in allowed):
                found.append(f"{place} imports {name}")
            if name.split(".")[0] == "cupy" and not place.startswith(CUPY_FOLDERS):
                found.append(f"{place} imports {name}")
    reached, todo = set(), ["shared.messages"]
    while todo:
        module = todo.pop()
        if module in reached:
            continue
        reached.add(module)
        for name in imports.get(module, ()):
            parts = name.split(".")  # importing shared.a.b also runs shared and shared.a
            todo += [".".join(parts[:n]) for n in range(1, len(parts) + 1)] if parts[0] == "shared" else []
            if name.split(".")[0] in HEAVY:
                found.append(f"shared/messages.py imports {name.split('.')[0]} through {module}")
    return found


def test_the_project_keeps_its_import_rules() -> None:
    """Services know only themselves and shared; shared only itself; tools no service; messages.py nothing heavy."""
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("place", "source", "expected"),
    [
        ("services/draft/service.py", "from services.verifier import policy", "services.verifier.policy"),
        ("services/draft/service.py", "def late():\n    import services.router.policy", "services.router.policy"),
        ("services/draft/service.py", "from ..router import policy", "services.router.policy"),
        ("services/draft/service.py", "from services import router", "services.router"),
        ("services/draft/service.py", "import tools.cli", "tools.cli"),
        ("shared/wire.py", "from services.draft.service import SERVICE", "services.draft.service.SERVICE"),
        ("shared/wire.py", "import tools", "tools"),
        ("tools/demo.py", "from services.gateway import requests", "services.gateway.requests"),
        ("tools/demo.py", "import tests", "tests"),
        ("shared/engine/numpy/ops.py", "import cupy as cp", "cupy"),
        ("shared/messages.py", "import zmq", "zmq"),
        ("shared/messages.py", "from tokenizers import Tokenizer", "tokenizers"),
        ("shared/fields.py", "import structlog", "structlog through shared.fields"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, place: str, source: str, expected: str) -> None:
    """A planted violation is named with the file that has it, wherever in the file the import stands."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/messages.py").write_text("from shared.fields import Range\n")
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    [violation] = violations(tmp_path)
    assert expected in violation


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("services/draft/service.py", "from services.draft import drafter\nfrom shared import wire\nimport zmq"),
        ("services/draft/service.py", "from . import drafter\nfrom .drafter import Drafter"),
        ("tools/demo.py", "from tools.fleet import Gateway\nfrom shared.settings import Settings"),
        ("shared/engine/cuda/engine.py", "import cupy\nfrom shared.kernels import loader"),
        ("shared/wire.py", "import msgpack, numpy\nfrom shared import messages"),
    ],
)
def test_an_allowed_import_is_left_alone(tmp_path: Path, place: str, source: str) -> None:
    """What the rules allow is not reported."""
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []
