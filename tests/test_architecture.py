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


RUNS_WHAT_IT_READS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
"""Modules whose readers can run code, or make any object, of what they read."""

RUN = {"eval", "exec", "compile", "__import__"}

LOADERS = {"torch": {"load"}, "np": {"load"}, "numpy": {"load"}, "pd": {"read_pickle"}}


def runs_code(tree: ast.AST) -> set[str]:
    """The calls in `tree` that could run code from data."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in RUN:
                found.add(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in LOADERS.get(module, ()):
                found.add(f"{module}.{name}")
            case ast.ImportFrom(module=module, names=names) if module in LOADERS:
                found |= {f"{module}.{alias.name}" for alias in names if alias.name in LOADERS[module]}
            case ast.keyword(arg="allow_pickle" | "weights_only" | "trust_remote_code", value=value):
                if not (isinstance(value, ast.Constant) and value.value is (node.arg == "weights_only")):
                    found.add(node.arg)
    return found


def test_no_pickle_and_no_code_from_what_is_read():
    for folder in [*ORDER, "src"]:
        for path in files(folder):
            assert not RUNS_WHAT_IT_READS & {name.partition(".")[0] for name in imports(path)}, path
            assert not runs_code(ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    "line", ["eval(text)", "exec(text)", "torch.load(path)", "from torch import load", "np.load(x, allow_pickle=True)"]
)
def test_code_from_what_is_read_would_be_seen(line):
    assert runs_code(ast.parse(line))


def test_the_server_never_lets_flower_read_an_array():
    """Array.numpy() reads what a foreign client calls "numpy.ndarray"; factors are read by their own type alone."""
    for path in [*files("server"), *files("client")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("to_numpy_ndarrays", "to_torch_state_dict"), path


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
