"""Check the structure of core/, cli/ and tests/ against the limits below.

Run `python tools/check_structure.py` to check, exit status 1 if anything is out of bounds, and with `--report` to print
the figures instead. `--root DIR` takes another checkout. Only the standard library is used.
"""

import argparse
import ast
import collections
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MIN_SINGLE_IMPORTER_LINES = 60
SOURCES = ("core", "cli")
PACKAGES = {"core": "critic_train", "cli": "critic_train_cli"}

BANNED_IDENTIFIERS = ("found", "place", "faults", "told", "known", "whole", "words", "kept", "wrong", "said")
"""Words that say nothing about what they name; in full, leading underscores aside."""

REPEATABLE_BASENAMES = ("__init__", "__main__")

SINGLE_IMPORTER_ALLOWED: dict[str, str] = {}
"""Small modules with at most one importer -> why they stand alone."""

REGISTERED_NAMES = ("FORMAT",)
"""A module that assigns one of these declares an entry of a list, as dump formats do: it may be small."""

UNTESTED_ALLOWED: dict[str, str] = {
    "critic_train.layers.attention_kernel": "the interface of kernels; test_sdpa_kernels and test_cuda_kernels hold it",
    "critic_train.verify.outcome": "one dataclass; test_verify and test_model_checks read every field",
}
"""Modules without a test file named after them -> why, and what tests them."""

FREE_TESTS: dict[str, str] = {"tests/core/test_init.py": "of the package itself: its lazy names"}
"""Test files under tests/core and tests/cli that are named after no module -> why."""


@dataclass(frozen=True)
class Module:
    """One Python file of the product.

    Attributes:
        path: relative to the root, as in "core/critic_train/data/split.py".
        name: dotted, as in "critic_train.data.split"; a package's `__init__` has the package's name.
        text: its source.
    """

    path: Path
    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def is_special(self) -> bool:
        """Whether the file's name is one that Python prescribes, such as `__init__`."""
        return self.path.stem in REPEATABLE_BASENAMES


def read_modules(root: Path) -> list[Module]:
    """All modules below `root`/core and `root`/cli, by path."""
    modules = []
    for source in SOURCES:
        for path in sorted((root / source).rglob("*.py")):
            parts = path.relative_to(root / source).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(Module(path.relative_to(root), name, path.read_text(encoding="utf-8")))
    return modules


def long_functions(module: Module) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """(function, lines) of every function above the limit, its signature and docstring counted, decorators not."""
    functions = [n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [(function, (function.end_lineno or function.lineno) - function.lineno + 1) for function in functions]
    return [(function, size) for function, size in sizes if size > MAX_FUNCTION_LINES]


def importers(modules: list[Module]) -> dict[str, set[str]]:
    """Module name -> names of the modules that import it, at any level and inside functions too."""
    names = {module.name for module in modules}
    result: dict[str, set[str]] = {name: set() for name in names}
    for module in modules:
        for node in ast.walk(module.tree):
            for target in _import_targets(node, module):
                if target in names and target != module.name:
                    result[target].add(module.name)
    return result


def _import_targets(node: ast.AST, module: Module) -> Iterator[str]:
    """Dotted names that an import statement may load; for a string constant, the string."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.name.split(".")[: None if module.path.stem == "__init__" else -1]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value  # lazily imported: importlib.import_module("critic_train.training.fit")


def identifiers(module: Module) -> Iterator[tuple[str, int]]:
    """(name, line) of everything that the module names: definitions, arguments, assigned variables and attributes."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def banned_identifiers(module: Module) -> list[tuple[str, int]]:
    """(name, line) of every identifier that is a banned word."""
    return [(name, line) for name, line in identifiers(module) if name.lstrip("_").lower() in BANNED_IDENTIFIERS]


def line_kinds(module: Module) -> dict[str, int]:
    """How many lines are code, docstring, comment and blank; a comment behind code counts as code."""
    docstring: set[int] = set()
    for node in ast.walk(module.tree):
        # A string that stands as a statement: a docstring, also that of a constant or of a field.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstring.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    comment: set[int] = set()
    code: set[int] = set()
    skipped = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            comment.add(token.start[0])
        elif token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    counts = {"code": len(code - docstring), "docstring": len(docstring), "comment": len(comment - code)}
    return counts | {"blank": module.lines - sum(counts.values())}


def test_owners(root: Path, modules: list[Module]) -> dict[Path, str | None]:
    """Test file -> name of the module that it is named after, None if there is no such module.

    tests/core/data/test_split_edges.py belongs to critic_train.data.split_edges if that exists, else to
    critic_train.data.split.
    """
    names = {module.name for module in modules}
    owners: dict[Path, str | None] = {}
    for source, package in PACKAGES.items():
        folder = root / "tests" / source
        for path in sorted(folder.rglob("test_*.py")):
            prefix = [package, *path.parent.relative_to(folder).parts]
            parts = path.stem.removeprefix("test_").split("_")
            longest_first = ("_".join(parts[:length]) for length in range(len(parts), 0, -1))
            candidates = [".".join([*prefix, candidate]) for candidate in longest_first]
            owners[path.relative_to(root)] = next((name for name in candidates if name in names), None)
    return owners


def needs_a_test(module: Module) -> bool:
    """Whether there is anything in a module to test: `__init__` and `__main__` only pass on."""
    return not module.is_special


def test_file(module: Module) -> Path:
    """Where the tests of a module belong."""
    source, _, *folders, _ = module.path.parts
    return Path("tests", source, *folders, f"test_{module.path.stem}.py")


def violations(root: Path) -> list[str]:
    """Everything that is out of bounds, one line each: where, what, what to do."""
    modules = read_modules(root)
    lines: list[str] = []
    for module in modules:
        if module.lines > MAX_FILE_LINES:
            lines.append(f"{module.path}: {module.lines} lines, at most {MAX_FILE_LINES}: split it")
        for function, size in long_functions(module):
            where = f"{module.path}:{function.lineno}"
            lines.append(f"{where}: {function.name} has {size} lines, at most {MAX_FUNCTION_LINES}: split it")
        for name, line in banned_identifiers(module):
            lines.append(f"{module.path}:{line}: the name {name!r} says nothing: name it after what it holds")
    for stem, paths in repeated_basenames(modules).items():
        where = " and ".join(map(str, paths))
        lines.append(f"{where}: {len(paths)} files are called {stem}.py: rename all but one")
    for module, users in small_single_importers(modules):
        what = f"{module.lines} lines and imported by {' '.join(users) or 'nothing'}"
        lines.append(f"{module.path}: {what}: merge it into another module")
    lines += _test_violations(root, modules)
    return lines + _stale_exceptions(root, modules)


def repeated_basenames(modules: list[Module]) -> dict[str, list[Path]]:
    """File name without its ending -> the files of that name, where there are several."""
    paths = collections.defaultdict(list)
    for module in modules:
        if not module.is_special:
            paths[module.path.stem].append(module.path)
    return {stem: found for stem, found in paths.items() if len(found) > 1}


def small_single_importers(modules: list[Module]) -> list[tuple[Module, list[str]]]:
    """(module, its importers) of the small modules that have at most one."""
    users = importers(modules)
    return [
        (module, sorted(users[module.name]))
        for module in modules
        if not module.is_special
        and module.lines < MIN_SINGLE_IMPORTER_LINES
        and len(users[module.name]) <= 1
        and module.name not in SINGLE_IMPORTER_ALLOWED
        and not any(name in REGISTERED_NAMES for name, _ in identifiers(module))
    ]


def _test_violations(root: Path, modules: list[Module]) -> list[str]:
    owners = test_owners(root, modules)
    tested = set(owners.values())
    lines = [
        f"{path}: named after no module: call it tests/.../test_<module>.py or test_<module>_<aspect>.py"
        for path, owner in owners.items()
        if owner is None and str(path) not in FREE_TESTS
    ]
    lines += [
        f"{module.path}: no test file is named after it: write {test_file(module)}"
        for module in modules
        if needs_a_test(module) and module.name not in tested and module.name not in UNTESTED_ALLOWED
    ]
    return lines


def _stale_exceptions(root: Path, modules: list[Module]) -> list[str]:
    """Entries of the lists at the top of this file that are no longer needed, for its own checkout only."""
    if root.resolve() != Path(__file__).resolve().parents[1]:
        return []
    names = {module.name for module in modules}
    stale = [name for name in (*SINGLE_IMPORTER_ALLOWED, *UNTESTED_ALLOWED) if name not in names]
    stale += [path for path in FREE_TESTS if not (root / path).exists()]
    return [f"{Path(__file__).name}: an exception names {entry}, which does not exist: delete it" for entry in stale]


def report(root: Path) -> Iterator[str]:
    """The figures, one a line."""
    modules = read_modules(root)
    sizes = sorted(module.lines for module in modules)
    largest = max(modules, key=lambda module: module.lines)
    yield f"files in core/ and cli/: {len(sizes)}"
    yield f"lines a file: median {statistics.median(sizes):g}, p90 {sizes[int(0.9 * (len(sizes) - 1))]}"
    yield f"largest file: {largest.lines} lines, {largest.path}"
    for source in SOURCES:
        yield _line_counts(source, [module for module in modules if module.path.parts[0] == source])
    yield _line_counts("core + cli", modules)
    long = [f"{m.path}:{function.name} {size}" for m in modules for function, size in long_functions(m)]
    yield _listed(f"functions above {MAX_FUNCTION_LINES} lines", long)
    yield _listed("file names that repeat", list(repeated_basenames(modules)))
    small = small_single_importers(modules)
    yield f"modules below {MIN_SINGLE_IMPORTER_LINES} lines with at most one importer: {len(small)}"
    counts = collections.Counter(
        name.lstrip("_").lower() for module in modules for name, _ in banned_identifiers(module)
    )
    scale = 10_000 / sum(sizes)
    words = ", ".join(f"{name} {counts[name] * scale:.1f}" for name in BANNED_IDENTIFIERS)
    yield f"banned identifiers per 10,000 lines: {words}; all {counts.total() * scale:.1f}"
    tested = set(test_owners(root, modules).values())
    due = [module for module in modules if needs_a_test(module)]
    yield f"modules with a test file named after them: {sum(m.name in tested for m in due)} of {len(due)}"


def _line_counts(title: str, modules: list[Module]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for module in modules:
        counts.update(line_kinds(module))
    total = counts.total()
    shares = ", ".join(f"{kind} {count} ({count / total:.1%})" for kind, count in counts.items())
    return f"lines of {title}: {total}, of which {shares}"


def _listed(title: str, entries: list[str]) -> str:
    return f"{title}: {len(entries)}" + (f" ({', '.join(entries)})" if entries else "")


def main() -> int:
    """Check or report; 1 if anything is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print the figures and check nothing")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout to read")
    chosen = parser.parse_args()
    if chosen.report:
        print("\n".join(report(chosen.root)))
        return 0
    lines = violations(chosen.root)
    print("\n".join(lines) or "structure: all within bounds")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
