"""What is built is what is here: packages, data files, root modules, and a light root."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import kvtune

ROOT = Path(kvtune.__file__).parent
NOT_SHIPPED = ("tests", "benchmarks", "docs", "constraints", "build", "dist", "kvtune-runs")
HEAVY = ("torch", "transformers", "optuna", "textual", "scipy", "gguf", "pydantic")


def settings() -> dict[str, Any]:
    """pyproject's setuptools table, as setuptools itself reads it."""
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml")
    read = pyprojecttoml.read_configuration(ROOT / "pyproject.toml", expand=False)
    found: dict[str, Any] = read["tool"]["setuptools"]
    return found


def shipped_folders() -> list[Path]:
    """Folders of the checkout that hold the product: not hidden, not generated, not tests."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(p.startswith((".", "__")) or p.endswith(".egg-info") for p in parts)
        if path.is_dir() and not hidden and parts[0] not in NOT_SHIPPED and any(path.iterdir()):
            found.append(path)
    return found


def package_of(folder: Path) -> str:
    return ".".join(("kvtune", *folder.relative_to(ROOT).parts))


def test_every_package_of_the_tree_is_listed() -> None:
    found = {package_of(f) for f in shipped_folders() if (f / "__init__.py").is_file()}
    assert set(settings()["packages"]) == found | {"kvtune"}


def test_every_folder_with_modules_is_a_package() -> None:
    bare = [f for f in shipped_folders() if not (f / "__init__.py").exists()]
    assert [package_of(f) for f in bare if any(f.glob("*.py"))] == []


def test_every_data_file_is_listed() -> None:
    globs = settings()["package-data"]
    packages = {f for f in (ROOT, *shipped_folders()) if (f / "__init__.py").is_file()}
    missing = []
    for folder in (ROOT, *shipped_folders()):
        owner = next(f for f in (folder, *folder.parents) if f in packages)
        for file in folder.glob("*"):
            name = file.relative_to(owner).as_posix()
            patterns = globs.get(package_of(owner), [])
            if is_data(file) and not any(fnmatch(name, pattern) for pattern in patterns):
                missing.append(file.relative_to(ROOT).as_posix())
    assert missing == []


def is_data(file: Path) -> bool:
    """Whatever is no module; the root's other files are the repository's, not the package's."""
    if file.parent == ROOT:
        return file.name == "py.typed"
    return file.is_file() and file.suffix not in (".py", ".pyc")


def test_every_listed_pattern_finds_a_file() -> None:
    for package, patterns in settings()["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            if folder.name == "tuner" and not (folder / "data").is_dir():
                pytest.skip("the packaged tables are not made yet")
            assert list(folder.glob(pattern)), f"{package}: {pattern}"


def test_no_stray_module_lies_in_the_root() -> None:
    """Whatever lies there would be installed as ``kvtune.<name>``."""
    assert {f.name for f in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_the_wheel_holds_only_kvtune_and_all_of_its_modules(tmp_path: Path) -> None:
    """setuptools' own plan of what goes where, without building."""
    dist = pytest.importorskip("setuptools.dist").Distribution()
    script = ROOT / "pyproject.toml"
    pytest.importorskip("setuptools.config.pyprojecttoml").apply_configuration(dist, script)
    dist.script_name = "setup.py"
    dist.src_root = str(ROOT)
    build = dist.get_command_obj("build_py")
    build.ensure_finalized()
    build.build_lib = str(tmp_path)
    targets = {Path(p).relative_to(tmp_path).parts for p in build.get_outputs(False)}
    assert {parts[0] for parts in targets} == {"kvtune"}
    assert not any("tests" in parts for parts in targets)
    modules = {f.relative_to(ROOT).parts for d in shipped_folders() for f in d.glob("*.py")}
    assert modules <= {parts[1:] for parts in targets}


def test_the_root_imports_nothing_heavy() -> None:
    code = f"import kvtune, sys; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_no_generic_name_is_importable() -> None:
    """``import simulator`` would be a second copy of ``kvtune.simulator``."""
    names = {f.name for f in shipped_folders() if f.parent == ROOT}
    assert not names & {m for m in sys.modules if "." not in m}


def test_module_and_distribution_agree_on_the_version() -> None:
    assert importlib.metadata.version("kvtune") == kvtune.__version__


def test_ci_runs_the_readmes_second_command() -> None:
    command = "pip install -c constraints/cpu.txt -e '.[dev]' && pytest"
    for file in ("README.md", ".ci/run"):
        assert command in (ROOT / file).read_text(encoding="utf-8").splitlines(), file
