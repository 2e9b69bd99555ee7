"""The structure of the tree: import order of packages and rooms, no cycles, folder sizes, public names."""

import ast
import collections
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# package -> the packages it may import from, beside open_unitok.core
MAY_IMPORT = {
    "core": set(),
    "configs": set(),
    "tokenizer": set(),
    "mllm": {"tokenizer"},
    "generation": {"tokenizer", "mllm"},
    "training": {"tokenizer", "mllm", "configs"},
    "eval": {"tokenizer", "mllm", "generation", "configs"},
}
# The rooms of a package from left to right: a room imports from itself and from the levels before its own.
# A file that lies in no room may import from all of them.
ROOMS = {
    "tokenizer": [{"adaptation"}, {"encoders", "quantizers", "frozen"}, {"decoders"}],
    "generation": [{"backends"}, {"serving"}, {"ui"}],
    "training": [{"core"}, {"data"}, {"tokenizer", "mllm", "scenes", "emoji"}],
    "eval": [
        {"core"},
        {"metrics", "judges"},
        {"understanding", "generation", "tokenizer"},
        {"report", "lmms_eval", "answers"},
    ],
}
# Public names with several homes, each with the reason.
SEVERAL_HOMES: dict[str, str] = {
    "add_arguments": "the protocol of a command",
    "run": "the protocol of a command",
    "load": "the protocol of a benchmark",
    "answer": "the protocol of a benchmark",
    "judge": "the protocol of a benchmark",
    "score": "the protocol of a benchmark",
    "submit": "the protocol of a benchmark",
    "main": "the entry point of a stage, a benchmark or the command line",
    "TrainState": "the loop of every training stage has the same parts",
    "StepOutput": "the loop of every training stage has the same parts",
    "build_train_state": "the loop of every training stage has the same parts",
    "train_step": "the loop of every training stage has the same parts",
    "merge_rank_states": "the loop of every training stage has the same parts",
    "save_checkpoint": "the loop of every training stage has the same parts",
    "Plan": "the protocol of a stage's plan",
    "plan_run": "the protocol of a stage's plan",
    "describe_step": "the protocol of a stage's plan",
    "model_on_meta": "the protocol of a stage's plan",
}
MOST_FILES = 20


def module_of(path: pathlib.Path) -> str:
    """The dotted name under which a file of the package is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "open_unitok" else ("open_unitok", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, pathlib.Path]:
    """Dotted name -> file, of every module of the package."""
    folders = ("open_unitok", *(p for p in MAY_IMPORT if p != "core"))
    return {module_of(file): file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))}


SOURCES = sources()


def type_checking_only(tree: ast.AST) -> set[ast.AST]:
    """The statements under `if TYPE_CHECKING:`, which no interpreter runs."""
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {child for block in blocks for statement in block.body for child in ast.walk(statement)}


def imports_of(module: str) -> set[str]:
    """The modules of ours that a module imports, inside functions too."""
    path = SOURCES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found, skipped = set(), type_checking_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names a module, `from module import name` does not
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else origin for name in names}
    return {name for name in found if name.split(".")[0] == "open_unitok"}


IMPORTS = {module: imports_of(module) for module in SOURCES}


def package_of(module: str) -> str:
    """`open_unitok.eval.core.harness` -> eval; the modules of the front door have their own name or ""."""
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_from_their_left(package):
    allowed = {package, "core", *MAY_IMPORT[package]}
    inside = [module for module in SOURCES if package_of(module) == package]
    assert inside
    for module in inside:
        # open_unitok itself is importable by all: __version__
        wrong = {
            name for name in IMPORTS[module] if package_of(name) not in allowed and name != "open_unitok"
        }
        assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_from_their_left(package):
    level = {room: i for i, rooms in enumerate(ROOMS[package]) for room in rooms}
    for module, imported in IMPORTS.items():
        parts = module.split(".")
        if parts[1:2] != [package] or len(parts) < 3 or parts[2] not in level:
            continue
        for name in imported:
            target = name.split(".")
            if target[1:2] == [package] and len(target) > 2 and target[2] != parts[2] and target[2] in level:
                assert level[target[2]] < level[parts[2]], f"{module} imports {name}"


def test_no_module_of_the_packages_imports_the_front_door():
    for module, imported in IMPORTS.items():
        if package_of(module) in MAY_IMPORT:
            outside = {
                n
                for n in imported
                if n.startswith(("open_unitok.cli", "open_unitok.demo", "open_unitok.doctor"))
            }
            assert not outside, f"{module} imports {outside}"


def test_no_import_cycle():
    """Deferred imports count: a cycle that is put off is still a cycle."""
    state: dict[str, int] = {}  # 1: on the current path, 2: finished

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for name in sorted(IMPORTS[module]):
            if state.get(name) == 1:
                raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
            if name in SOURCES and name not in state:
                visit(name, [*path, name])
        state[module] = 2

    for module in SOURCES:
        # `open_unitok` resolves public names lazily through strings, `cli.main` finds commands by name
        if module not in state:
            visit(module, [module])


def test_imports_between_packages_are_absolute_and_inside_relative():
    for module, path in SOURCES.items():
        top = package_of(module)
        depth = len(path.relative_to(ROOT / ("open_unitok" if top == "core" else ".")).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert top not in MAY_IMPORT or node.level <= depth, f"{module} leaves its package"
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for first, *rest in (name.split(".") for name in names):
                # `import tokenizer` would load a second copy of every class
                assert first not in MAY_IMPORT, f"{module}: import open_unitok.{first} instead"
                relative = first == "open_unitok" and rest[:1] == [top] and top in MAY_IMPORT
                assert not relative, f"{module}: imports inside {top} are relative"


def test_folders_hold_at_most_twenty_files():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    files = [pathlib.PurePosixPath(name) for name in tracked.splitlines() if (ROOT / name).exists()]
    counts = collections.Counter(file.parent for file in files if "golden" not in file.parts)
    assert not {str(folder): n for folder, n in counts.items() if n > MOST_FILES}


def homes() -> dict[str, list[str]]:
    """Public module-level name -> the modules that define it."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for module, path in SOURCES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                # the name of `name.attribute = ...` is only read
                nodes = [n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                names = [n.id for n in nodes if isinstance(n.ctx, ast.Store)]
            else:
                continue
            for name in set(names):
                if not name.startswith("_"):
                    found[name].append(module)
    return found


def test_each_public_name_has_one_home():
    several = {name: modules for name, modules in homes().items() if len(modules) > 1}
    unexpected = {name: modules for name, modules in several.items() if name not in SEVERAL_HOMES}
    assert not unexpected, "\n".join(f"{name}: {', '.join(m)}" for name, m in sorted(unexpected.items()))
    assert not SEVERAL_HOMES.keys() - several.keys(), "the list of exceptions names what has one home"


def test_no_file_names_a_path_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "pyproject.toml" in tracked
    for name in filter(None, tracked.split("\n")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".yml", ""} and path.is_file():
            assert not re.search(r"(?<![\w.])/(?:work|root)/", path.read_text(errors="ignore")), name
