"""The house: imports point one way, every module says what it imports, and the root holds what it should."""

import ast
import os
import re
import runpy
import tomllib
from pathlib import Path

import pytest

BASE = {"errors", "config", "dist", "log", "checkpoint"}
ALLOWED = {
    "kernels": {"errors"},
    "data": {"kernels"} | BASE,
    "model": {"kernels"} | BASE,
    "decision": {"kernels"} | BASE,
    "errors": set(),
    "start": set(),
    "config": {"errors"},
    "dist": {"start", "errors"},
    "checkpoint": {"errors"},
    "log": {"checkpoint", "dist", "errors"},
    "cli": {"config", "checkpoint", "dist", "start", "errors"},
    "jobs": {"dist", "log", "start", "errors"},
    "score": {"data", "decision", "kernels", "log", "errors"},
    "submission": {"data", "kernels", "checkpoint", "errors"},
    "journal": {"checkpoint", "dist", "log", "errors"},
    "signals": {"start"},
    "stages": BASE,
    "measured": {"engine", "kernels"} | BASE,
    "dataset": {"data"} | BASE,
    "engine": {"data", "model", "decision"} | BASE,
    "resume": {"dataset", "stages"} | BASE,
    "training": {"data", "model", "decision", "kernels", "dataset", "engine", "measured", "resume", "signals", "stages"}
    | BASE,
    "ensemble": {"model", "decision", "engine", "measured", "stages"} | BASE,
    "oof": {"data", "decision", "dataset", "stages", "ensemble"} | BASE,
    "tuning": {"decision", "dataset", "ensemble", "oof"} | BASE,
    "inference": {"data", "decision", "dataset", "ensemble", "tuning", "submission", "journal"} | BASE,
    "given": {"data", "decision", "kernels", "ensemble", "tuning", "inference", "journal"} | BASE,
    "report": {"data", "decision", "kernels", "dataset", "training", "ensemble", "oof", "tuning"} | BASE,
}


def imported(path: Path) -> set[str]:
    """Rooms of pneumo that a file imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pneumo":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pneumo.")}
    return rooms


def modules(repo: Path) -> list[tuple[str, Path]]:
    files = sorted((repo / "pneumo").rglob("*.py"))
    return [(path.relative_to(repo / "pneumo").parts[0].removesuffix(".py"), path) for path in files]


def test_imports_point_one_way(repo):
    checked = 0
    for room, path in modules(repo):
        if room in ("__init__", "__main__"):
            continue
        assert imported(path) - {room} <= ALLOWED[room], path
        checked += 1
    assert checked > 25


def said(path: Path) -> set[str]:
    """What a module's docstring says that it imports of pneumo."""
    found = re.search(r"Imports\s([^.]*)\.", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
    return set() if found is None or found[1].startswith("nothing") else set(re.split(r",\s*", found[1]))


def by_name(path: Path, room: str) -> set[str]:
    """Names of what a module imports of pneumo: of its own room the modules, of others the room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pneumo":
            parts = node.module.split(".")[1:]
            parts = parts[1:] if parts[:1] == [room] else parts
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
    return names


def test_every_module_says_what_it_imports(repo):
    for room, path in modules(repo):
        if path.name != "__main__.py":
            assert said(path) == by_name(path, room), path


def test_the_readme_knows_the_house(repo):
    """Every module and recipe has its place in it, and every target of make that it names is there."""
    text = (repo / "README.md").read_text(encoding="utf-8")
    house = text[text.index("## Code layout") :]
    for path in sorted((repo / "pneumo").iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            assert re.search(rf"\b{path.name}", house), path
        elif path.is_dir() and (path / "__init__.py").exists():
            assert re.search(rf"\b{path.name}/", house), path
    targets = set(re.findall(r"^([a-z-]+):", (repo / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert len(named) > 12 and named <= targets
    recipes = tomllib.loads((repo / "configs.toml").read_text(encoding="utf-8"))
    assert all(f"`{name}`" in text for name in recipes)


def test_scripts_alone_stand_at_the_top(repo):
    assert sorted(path.name for path in repo.glob("*.py")) == ["predict.py", "train.py"]


def test_the_first_of_several_test_processes_leaves_the_gpu_to_the_others(repo, monkeypatch):
    """It imports conftest.py before it starts them, and they inherit its environment."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])  # set anew, and then as before
    runpy.run_path(str(repo / "tests" / "conftest.py"))
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TRITON_INTERPRET"]) == ("0", "0")


def test_every_module_and_public_function_says_what_it_is_for(repo):
    for _, path in modules(repo):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize("banned", ["LOAD_TRUNCATED_IMAGES = True", "weights_only=False", "exec(", "eval("])
def test_what_is_never_done(repo, banned):
    for _, path in modules(repo):
        text = path.read_text(encoding="utf-8").replace(".eval(", "")
        assert banned not in text, path
