"""The documentation cannot rot: flags, aliases and exit codes in it are those of the code."""

import ast
import builtins
import re
import tomllib
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard

import critic_train
from critic_train import __version__
from critic_train.data.schema import ALIASES
from critic_train_cli.main import COMMANDS
from critic_train_cli.options import options_of

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "sample_data" / "README.md"]
OF_EVERY_COMMAND = {"--config", "--print-config", "--json", "--quiet", "--debug", "--help", "--version"}
OF_OTHER_PROGRAMS = {
    "--save-debug-train-data",
    "--save-debug-rollout-data",
    "--critic.model_name_or_path",
    "--reward.normalize_enable",
    "--runner",
    "--no-deps",
    "--wheel-dir",
    "--strict",
    "--size",
    "--slow-budget",
    "--minutes",
    "--kind",
    "--torch",
    "--transformers",
    "--only",
    "--rollouts",
    "--rounds",
    "--world",
    "--yardstick-preset",
    "--logdir",
    "--cpus-per-task",
    "--gpus-per-node",
    "--master-addr",
    "--master-port",
    "--max-restarts",
    "--nnodes",
    "--node-rank",
    "--nodes",
    "--nproc-per-node",
    "--ntasks-per-node",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--shutdown-timeout",
    "--signal",
}


FLAGS = {option.flag for command in COMMANDS for option in options_of(command.settings) if not option.positional}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_on_a_page_exists(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", page.read_text()))
    assert named <= FLAGS | OF_EVERY_COMMAND | OF_OTHER_PROGRAMS


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [command.name for command in COMMANDS if f"critic-train {command.name}" not in text] == []


def test_the_aliases_on_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "reference" / "data.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", page, flags=re.MULTILINE))
    written = {name: tuple(re.findall(r"`(\w+)`", names)) for name, names in table.items()}
    assert written == {name: names for name, names in ALIASES.items() if names}


LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
LINKED_PAGES = [*PAGES, ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [(target, page.parent / target if target else page, anchor) for target, anchor in LINK.findall(prose)]
    assert [target for target, file, _ in links if not file.exists()] == []
    assert [f"{target}#{anchor}" for target, file, anchor in links if anchor and anchor not in anchors(file)] == []


def test_the_index_links_every_page_of_the_documentation():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target, _ in LINK.findall(index.read_text()) if target}
    pages = {page for folder in ("guides", "concepts", "reference") for page in (ROOT / "docs" / folder).glob("*.md")}
    assert pages <= linked


PYTHON_PAGE = (ROOT / "docs" / "reference" / "python.md").read_text()
PYTHON_CODE = re.findall(r"^```python\n(.*?)^```$", PYTHON_PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_python_page_names_what_the_package_exports_and_no_more():
    prose = re.sub(r"^```.*?^```$", "", PYTHON_PAGE, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", prose))
    assert set(critic_train.__all__) <= named
    classes = {name for name in named if re.match(r"[A-Z][a-z]\w*[A-Z]|[A-Z][a-z]+$", name)}
    imported = {
        name
        for line in re.findall(r"^from critic_train import (.*)$", PYTHON_PAGE, re.MULTILINE)
        for name in line.split(", ")
    }
    assert (classes - set(dir(builtins))) | imported <= set(critic_train.__all__)


def test_the_code_of_the_python_page_runs(tmp_path, monkeypatch, capsys):
    for folder, seed in (("rollouts", 0), ("held_out", 1)):
        write_shard(tmp_path / folder / "a.parquet", readable_rollouts(8, seed=seed))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in PYTHON_CODE:
        exec(code, names)
    shown = capsys.readouterr().out
    for code in PYTHON_CODE:
        assert [line for line in re.findall(r"print\(.*\)  # (.*)$", code, re.MULTILINE) if line not in shown] == []
    assert (tmp_path / "mine" / "part-00000.parquet").is_file()


def test_the_version_stands_in_one_place_and_heads_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "core/critic_train/__init__.py"
    released = re.findall(
        r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert released[0] == __version__


def test_the_layers_on_the_map_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    block = "\n".join(layer.replace(" | ", ", ") for layer in layers)
    assert f"```\n{block}\n```" in (ROOT / "ARCHITECTURE.md").read_text()


MAPS = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
PACKAGES = {"critic_train": ROOT / "core", "critic_train_cli": ROOT / "cli"}
FOLDERS = [ROOT, *(folder / package for package, folder in PACKAGES.items())]
OTHER_NAMES = {"Args", "Raises", "NAME", "state_dict", "tool.importlinter"}
"""Words in backticks that are of Python, torch or import-linter, or stand for a name."""


def code_names(page: Path) -> set[str]:
    """What stands in backticks on a page, outside of blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose))


def names_in(package: str) -> set[str]:
    """Dotted names of all modules of a package, of what they define and of what their classes define."""
    names: set[str] = set()
    for path in sorted((PACKAGES[package] / package).rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGES[package] / package).with_suffix("").parts).removesuffix(".__init__")
        names |= {module, *(".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1))}
        for node in ast.parse(path.read_text()).body:
            for name in defined(node):
                names.add(f"{module}.{name}")
            if isinstance(node, ast.ClassDef):
                names |= {f"{module}.{node.name}.{name}" for each in node.body for name in defined(each)}
    return names


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


COMMAND_NAMES = {command.name for command in COMMANDS}
KNOWN_NAMES = names_in("critic_train") | names_in("critic_train_cli")
LAST_PARTS = {part for name in KNOWN_NAMES for part in name.split(".")}


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_every_file_module_and_function_on_the_maps_exists(page):
    """Files with their ending or a slash; dotted names from below the package; classes and constants by themselves."""
    missing = []
    for name in sorted(code_names(page) - OTHER_NAMES):
        if name.startswith("OUT/") or name.endswith((".json", ".jsonl")):
            continue  # a run writes them
        if re.fullmatch(r"[\w.-]*/[\w./-]*|[\w-]+\.(py|md|toml|txt|cff)", name):
            exists = any((folder / name.rstrip("/")).exists() for folder in FOLDERS)
            exists = exists or ("/" not in name and any(ROOT.glob(f"*/**/{name}")))
        elif re.fullmatch(r"[a-z_]\w*(\.\w+)+", name):
            exists = name.removeprefix("critic_train.") in KNOWN_NAMES
        elif re.fullmatch(r"[A-Z][a-z]+([A-Z]\w*)?|[A-Z]{2,}(_[A-Z]+)*|[a-z]+(_[a-z]+)+", name):
            exists = name in LAST_PARTS
        else:
            continue
        if not exists:
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_gaps(page):
    assert "TODO" not in page.read_text()


def test_the_map_has_a_row_for_every_folder_and_module_of_the_library():
    """And each row names modules of that folder, or what they define."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|(.*)", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE)
    table = {name: about for names, about in rows for name in re.findall(r"`(\w+)`", names)}
    library = ROOT / "core" / "critic_train"
    there = {path.stem for path in library.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} <= table.keys()
    named = {folder: set(re.findall(r"`(\w+)`", table[folder])) - COMMAND_NAMES for folder in there - {"__init__"}}
    inside = {folder: {n.split(".")[1] for n in KNOWN_NAMES if n.startswith(f"{folder}.")} for folder in named}
    assert {folder: names - inside[folder] for folder, names in named.items() if names - inside[folder]} == {}


def test_the_readme_opens_with_the_two_commands():
    block = re.search(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    assert [line.split("  ")[0] for line in block.group(1).splitlines()] == ["./dev demo", "./dev test"]


def test_every_scenario_on_the_reliability_page_has_a_test_that_exists():
    page = (ROOT / "docs" / "concepts" / "reliability.md").read_text()
    rows = {int(number): row for number, row in re.findall(r"^\| (\d+) \|(.*)$", page, flags=re.MULTILINE)}
    assert sorted(rows) == list(range(1, 33))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    named = {number: set(re.findall(r"`(test_\w+)`", row)) for number, row in rows.items()}
    assert all(named.values())
    assert {number: names - there for number, names in named.items() if names - there} == {}
