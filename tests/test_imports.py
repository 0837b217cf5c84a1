"""Imports go one way, and never in a circle.

    examples, benchmarks -> models, guides -> Pyro and lvppl.distributions
    lvppl.cli -> inspection, inference, data, io -> objectives, engine
              -> evidence, terms, checks and the like -> distributions, errors

Every module is parsed, not run, so imports inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("lvppl", "models", "guides", "examples", "benchmarks")
MAPPED = {"models": "lvppl.models", "guides": "lvppl.guides"}  # as they are installed

# What each room may import of the project, besides itself.
GROUND = {"errors", "chains", "distributions"}
CORE = GROUND | {"core"}
FORMULAS = CORE | {"objectives", "engine"}
ROOMS_ABOVE = FORMULAS | {"inspection", "inference", "data", "io"}
MAY_IMPORT = {
    "errors": set[str](),
    "chains": {"errors"},
    "distributions": {"errors", "chains"},
    "core": GROUND,
    "objectives": CORE,
    "engine": CORE,
    "inspection": ROOMS_ABOVE,
    "inference": ROOMS_ABOVE,
    "data": ROOMS_ABOVE,
    "io": ROOMS_ABOVE,
    "package": ROOMS_ABOVE,  # lvppl/__init__.py, the curated public names
    "cli": ROOMS_ABOVE | {"package", "models", "guides"},
    "models": GROUND,
    "guides": GROUND,
    "examples": ROOMS_ABOVE | {"package", "models", "guides"},
    "benchmarks": ROOMS_ABOVE | {"package", "models", "guides"},
}
WHY_NOT = {
    "package": "the package imports its rooms, so a room that imports the package runs in a circle",
    "models": "the library must run any Pyro program, and so knows of no model",
    "guides": "the library must run any Pyro program, and so knows of no guide",
    "tests": "tests import the project, never the reverse",
    "examples": "examples are at the top: nothing imports them",
    "benchmarks": "benchmarks are at the top: nothing imports them",
    "engine": "objectives are formulas, and the engine runs steps: neither knows of the other",
    "objectives": "objectives are above the log-terms, and the engine knows nothing of them",
}
LOWER = "it is a room above, and imports go down only"


@dataclass(frozen=True)
class Import:
    """One import statement: who, which line, what, and whether it runs when the module loads."""

    importer: str
    path: str
    line: int
    target: str
    at_load: bool


def room_of(module: str) -> str:
    """The room of DESIGN a module belongs to."""
    parts = module.split(".")
    if parts[0] != "lvppl":
        return parts[0]
    if len(parts) == 1:
        return "package"
    return parts[1] if parts[1] in MAY_IMPORT else "core"


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join([MAPPED.get(parts[0], parts[0]), *parts[1:]])


def modules(root: Path) -> dict[str, Path]:
    """Every module of the project by its installed name."""
    paths = (path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))
    return {module_name(path, root): path for path in paths}


def imports_of(name: str, path: Path, known: dict[str, Path], root: Path) -> Iterator[Import]:
    """The project's own modules that a module imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    later = {id(node) for outer in ast.walk(tree) if runs_later(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        for target in targets_of(node, name, path, known):
            place = path.relative_to(root).as_posix()
            yield Import(name, place, node.lineno, target, id(node) not in later)  # type: ignore[attr-defined]


def runs_later(node: ast.AST) -> bool:
    """A function's body, or what only a type checker reads."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def targets_of(node: ast.AST, importer: str, path: Path, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = importer.split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, *base.split(".")]) if base else ".".join(package)
        # `from lvppl import terms` imports lvppl.terms; `from lvppl import ELBO` the package.
        names = [
            f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
            for alias in node.names
        ]
    else:
        return []
    project = {*FOLDERS, "tests"}
    return sorted({installed(name) for name in names if name.split(".")[0] in project})


def installed(name: str) -> str:
    """`models.vae` is lvppl.models.vae, whatever way it was reached."""
    first, *rest = name.split(".")
    return ".".join([MAPPED.get(first, first), *rest])


def complaints(root: Path) -> list[str]:
    """One sentence for every import that goes the wrong way."""
    known, found = modules(root), []
    for name, path in known.items():
        for item in imports_of(name, path, known, root):
            here, there = room_of(name), room_of(item.target)
            if here != there and there not in MAY_IMPORT[here]:
                why = WHY_NOT.get(there, LOWER)
                found.append(
                    f"{item.path}:{item.line} imports {item.target}, but {here} may import "
                    f"{', '.join(sorted(MAY_IMPORT[here])) or 'nothing of the project'}: {why}."
                )
    return found


def circle(root: Path) -> list[str]:
    """A circle of modules that import each other while they load, or nothing."""
    known = modules(root)
    edges = {
        name: {i.target for i in imports_of(name, path, known, root) if i.at_load} - {name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done or name not in edges:
            return []
        for target in sorted(edges[name]):
            if found := walk(target, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def test_imports_go_one_way() -> None:
    assert len(modules(ROOT)) > 10, "the modules of the project were not found"
    found = complaints(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_module_imports_itself_in_a_circle() -> None:
    found = circle(ROOT)
    assert not found, "imports run in a circle: " + " -> ".join(found)


WRONG = {
    "a model in the library": ("lvppl/terms.py", "import lvppl.models.vae", "knows of no model"),
    "a model in a function": (
        "lvppl/inference/svi.py",
        "def f():\n    from lvppl.models import vae",
        "knows of no model",
    ),
    "a model by its folder": ("lvppl/checks.py", "from models import vae", "knows of no model"),
    "a guide in a model": ("models/vae.py", "from lvppl.guides import x", "knows of no guide"),
    "upwards": ("lvppl/terms.py", "from lvppl.objectives import ELBO", "above the log-terms"),
    "upwards, relatively": ("lvppl/terms.py", "from .inference.svi import SVI", "down only"),
    "upwards by two": ("lvppl/objectives/elbo.py", "from ..inference import svi", "down only"),
    "the package": ("lvppl/objectives/elbo.py", "from lvppl import ELBO", "in a circle"),
    "a model that fits itself": ("models/vae.py", "from lvppl.inference import svi", "down only"),
    "an objective that compiles": ("lvppl/objectives/elbo.py", "import lvppl.engine", "neither"),
    "a test": ("lvppl/io.py", "from tests.programs import PROGRAMS", "never the reverse"),
    "an example": ("benchmarks/speed.py", "import examples.demo", "nothing imports them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_import_is_found(case: str, tmp_path: Path) -> None:
    """The test itself is tested: each wrong import is named, by file and line."""
    file, statement, reason = WRONG[case]
    scaffold(tmp_path)
    (tmp_path / file).write_text(f"import torch\n{statement}\n", encoding="utf-8")
    (found,) = complaints(tmp_path)
    line = 2 + statement.count("\n")
    assert found.startswith(f"{file}:{line} imports ")
    assert reason in found


RIGHT = [
    ("models/vae.py", "from lvppl.distributions import DiscretizedLogistic"),
    ("models/vae.py", "from lvppl.errors import ProgramError"),
    ("models/vae.py", "from lvppl.models.mixture import components"),
    ("lvppl/objectives/elbo.py", "from lvppl import terms"),
    ("lvppl/objectives/elbo.py", "from ..terms import Terms"),
    ("lvppl/__init__.py", "from lvppl.inference.svi import SVI"),
    ("lvppl/cli.py", "from lvppl.models import vae"),
    ("examples/demo.py", "import lvppl\nfrom lvppl.guides import meanfield"),
]


@pytest.mark.parametrize(("file", "statement"), RIGHT)
def test_a_right_import_is_let_be(file: str, statement: str, tmp_path: Path) -> None:
    scaffold(tmp_path)
    (tmp_path / file).write_text(statement + "\n", encoding="utf-8")
    assert complaints(tmp_path) == []


def test_a_circle_is_found_and_a_late_import_is_none(tmp_path: Path) -> None:
    scaffold(tmp_path)
    (tmp_path / "lvppl/io.py").write_text("from lvppl.inference.svi import SVI\n")
    (tmp_path / "lvppl/inference/svi.py").write_text("import lvppl.io\n")
    assert circle(tmp_path) in (
        ["lvppl.inference.svi", "lvppl.io", "lvppl.inference.svi"],
        ["lvppl.io", "lvppl.inference.svi", "lvppl.io"],
    )
    (tmp_path / "lvppl/inference/svi.py").write_text("def save():\n    import lvppl.io\n")
    assert circle(tmp_path) == []


def scaffold(root: Path) -> None:
    """The rooms, empty."""
    files = "__init__ terms checks io cli objectives/__init__ objectives/elbo inference/__init__ "
    files += "inference/svi engine/__init__ errors distributions/__init__"
    paths = [f"lvppl/{file}.py" for file in files.split()]
    paths += ["models/vae.py", "models/mixture.py", "guides/x.py", "examples/demo.py"]
    for path in [*paths, "benchmarks/speed.py"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("", encoding="utf-8")
