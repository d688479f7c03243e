"""Who may import whom, and what the algorithm may not do. Files are parsed, not run."""

import ast
import graphlib
import pathlib
import re
import sys

import pytest

import envs

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("jmql", "envs", "experiments")
FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in ROOMS}
ENGINES = {"brax", "mujoco", "gymnasium"}

# The direction of docs/design.md section 1: a module imports from its own level or a lower one.
LEVELS = (
    {"types", "settings", "config", "keys"},
    {"gru", "networks", "mesh"},
    {"replay"},
    {"inputs"},
    {"learner", "rollout", "td3", "policy_gradient", "propensity"},
    {"adapt", "train"},
    {"evaluate", "mql", "p3o"},
    {"cycle", "policy"},
)


def imports(tree):
    """Returns the dotted names that a module imports, importlib.import_module included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            text = node.args[0]
            if isinstance(text, ast.JoinedStr):  # an f-string: its beginning names the package
                text = text.values[0]
            if isinstance(text, ast.Constant):
                names.add(text.value)
    return names


def called(node):
    """Returns the last part of the name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def parse(path):
    return ast.parse(path.read_text(), str(path))


def packages(path):
    return {name.split(".")[0] for name in imports(parse(path))}


def test_imports_are_found():
    """The parser of this file, on every way to import."""
    source = """
import a.b, c
from d.e import f
def g():
    importlib.import_module("h.i")
    import_module(f"j.{k}.l")
    __import__("m")
"""
    assert imports(ast.parse(source)) == {"a.b", "c", "d.e.f", "h.i", "j.", "m"}


def test_jmql_imports_only_what_it_computes_with():
    allowed = {"jax", "numpy", "flax", "optax", "chex", "jmql"} | sys.stdlib_module_names
    for path in FILES["jmql"]:
        assert packages(path) <= allowed, path


def test_envs_import_nothing_of_the_other_rooms():
    for path in FILES["envs"]:
        assert not packages(path) & {"jmql", "experiments"}, path


def test_two_files_import_a_physics_engine():
    """But for anchors, whose business is another's simulator or learner."""
    found = {path for room in ROOMS for path in FILES[room] if packages(path) & ENGINES}
    names = ("arm", "brax_ppo", "gymnasium_play")
    anchors = {ROOT / f"experiments/anchors/{name}.py" for name in names}
    assert found == {ROOT / "envs/physics.py", ROOT / "envs/steps.py"} | anchors
    for path in FILES["jmql"] + FILES["experiments"]:
        assert "etils" not in packages(path), path


def test_families_do_not_import_each_other():
    """But for single tasks, which have the bodies of others, and which nobody imports."""
    families = {path.partition(":")[0] for path in envs.FAMILIES.values()}
    shared = ("envs.base.", "envs.physics.", "envs.locomotion.")
    lent = {"envs.single": ("envs.ant.", "envs.cheetah.", "envs.humanoid.")}
    for module in families:
        path = ROOT / f"{module.replace('.', '/')}.py"
        ours = {name for name in imports(parse(path)) if name.split(".")[0] == "envs"}
        assert ours, path
        assert all(name.startswith(shared + lent.get(module, ())) for name in ours), path
    for name in ("base", "physics", "steps", "locomotion"):
        assert not imports(parse(ROOT / f"envs/{name}.py")) & families


def test_jmql_imports_in_one_direction():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    graph = {}
    for path in FILES["jmql"]:
        if path.stem == "__init__":  # the door: what is imported when a name is asked for
            now = [
                node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            assert not [name for node in now for name in imports(node) if name.startswith("jmql")]
            continue
        used = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("jmql.")}
        graph[path.stem] = used
        assert all(level[name] <= level[path.stem] for name in used), path
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_named_for_what_they_hold(room):
    assert FILES[room]
    assert not {path.name for path in FILES[room]} & {"utils.py", "common.py"}


def test_jmql_does_not_print_open_files_or_call_the_host():
    """But for `policy`, whose business is a file."""
    host = {"print", "open", "callback", "pure_callback", "io_callback", "device_get"}
    disk = {"ZipFile", "read_text", "read_bytes", "write_text", "write_bytes", "save", "load"}
    for path in FILES["jmql"]:
        refused = host if path.stem == "policy" else host | disk
        calls = {called(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
        assert not calls & refused, path


def test_documents_that_are_named_exist():
    """A document is named by its path from the root of the project."""
    found = set()
    for path in (path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")):
        for name in re.findall(r"[\w/.-]+\.md\b", path.read_text()):
            assert (ROOT / name).is_file(), (path, name)
            found.add(name)
    assert found >= {"docs/method.md", "docs/tasks.md", "docs/design.md"}
