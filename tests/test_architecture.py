"""The folders depend on one another in one direction, and every one of them is installed."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["simulations", "server", "client", "adapters", "aggregation"]
"""Each folder may import those after it."""

LIBRARIES = {
    "aggregation": {"torch"},
    "adapters": {"torch", "peft", "transformers", "huggingface_hub", "safetensors"},
}
FLOWER = {"server", "client", "simulations"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    allowed = ORDER[ORDER.index(folder) :]
    assert files(folder)
    for path in files(folder):
        for name in imports(path):
            if name.startswith("corolla."):
                assert name.split(".")[1] in allowed, f"{path} imports {name}"
            assert name.split(".")[0] not in ORDER, f"{path} imports {name} without corolla."


@pytest.mark.parametrize("folder", sorted(LIBRARIES))
def test_the_inner_folders_know_their_libraries_alone(folder):
    import sys

    for path in files(folder):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"corolla"}
        assert outside <= LIBRARIES[folder], path


def test_flower_is_known_in_three_folders_and_peft_in_one():
    for folder in ORDER:
        for path in files(folder):
            roots = {name.split(".")[0] for name in imports(path)}
            assert "flwr" not in roots or folder in FLOWER, path
            assert "peft" not in roots or folder == "adapters", path


def test_no_pickle_anywhere():
    for folder in [*ORDER, "src"]:
        for path in files(folder):
            assert not {"pickle", "dill", "cloudpickle"} & imports(path), path
            assert "torch.load" not in path.read_text(), path


def test_every_folder_is_a_package_that_is_installed():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {"corolla"} | {f"corolla.{folder}" for folder in ORDER}
    for folder in ORDER:
        packages |= {
            "corolla." + ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / folder).rglob("__init__.py")
        }
    assert set(tools["packages"]) == packages == set(tools["package-dir"])


def test_there_is_one_copy_of_every_class():
    import corolla.aggregation

    assert Path(corolla.aggregation.__file__).parent == ROOT / "aggregation"
