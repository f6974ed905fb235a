"""The structure of the app: lengths of functions, constant SQL statements, settings."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from preference_collection.settings import DEFAULTS, NUMBERS, check_access, limits_of, load_settings
from preference_training.core.errors import UserError

PACKAGE = Path(__file__).parent.parent
ROOT = PACKAGE.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "tests" not in path.parts and "tests_whole" not in path.parts)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_functions_fit_on_a_screen_and_public_ones_have_docstrings(path):
    nodes = list(ast.walk(tree_of(path)))
    inner = {id(node) for outer in nodes if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer) if node is not outer}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name.startswith("_") or id(node) in inner or ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_sql_statements_are_constants():
    """`execute` and similar calls get a constant of the program, or the name of one."""
    constants = set()
    for path in MODULES:
        for node in tree_of(path).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants.add(node.targets[0].id)
    for path in MODULES:
        for function in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)):
            named = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
            local = {node.targets[0].id for node in named if isinstance(node.value, ast.Constant)}
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                name = ast.unparse(call.func).rsplit(".", 1)[-1]
                if name in ("execute", "executemany", "_rows", "_row", "insert", "sql", "query"):
                    said = call.args[1 if name == "insert" else 0]
                    fine = isinstance(said, ast.Constant) or (isinstance(said, ast.Name) and said.id in constants | local)
                    # The helper that passes a statement on, and the migrations, which are constants within a constant.
                    assert fine or ast.unparse(said) == "statement", f"{path.name}: {ast.unparse(call)}"
    # The constants are built from constants only.
    for node in (node for path in sorted((PACKAGE / "store").glob("*.py")) for node in tree_of(path).body):
        if isinstance(node, ast.Assign):
            values = [value.value for value in ast.walk(node.value) if isinstance(value, ast.FormattedValue)]
            assert all(isinstance(value, ast.Name) and value.id in constants for value in values)


def test_an_installed_package_has_the_files_that_are_no_modules():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    given = {path for name, forms in tables.items() for form in forms for path in (ROOT / name.replace(".", "/")).glob(form)}
    apart = {"tests", "tests_whole", "__pycache__"}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and not apart & set(path.parts) and path.suffix != ".py"}
    assert files - given == set(PACKAGE.glob("requirements*.txt"))


# ---- settings ---------------------------------------------------------------------------------------------------------------


def leaves(config, prefix=""):
    for key, value in config.items():
        yield from leaves(value, f"{prefix}{key}.") if OmegaConf.is_dict(value) else [f"{prefix}{key}"]


# What the page reads.
OF_THE_PAGE = ("export", "samples", "port", "temperature", "max_tokens", "slow_seconds", "run_unisolated", "reasons")


def test_every_setting_has_a_comment_and_a_reader():
    lines = DEFAULTS.read_text().splitlines()
    code = "".join(path.read_text() for path in MODULES)
    for number, line in enumerate(lines):
        if match := re.match(r"( *)(\w+):", line):
            above = lines[number - 1].strip()
            assert above.startswith("#") or above.startswith("address:"), line
            name = match[2]
            if name in OF_THE_PAGE:
                continue
            assert re.search(rf"settings\.{name}\b|config\.{name}\b|limits\.{name}\b|self\.{name}\b", code), name


def test_the_defaults_are_valid_and_can_be_overridden():
    settings = load_settings(["store=md:mine", "limits.memory_mb=64", "reasons=[good]", "ollama_host=null"])
    assert (settings.store, settings.port, list(settings.reasons)) == ("md:mine", 8501, ["good"])
    assert limits_of(settings).of_process()["RLIMIT_AS"] == 64 * 2**20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stor=x", "'stor=x' overrides no setting; did you mean store?"),
        ("store", "'store' overrides no setting"),
        ("store=", "store: found nothing, expected a non-empty string."),
        ("port=99999", "port: found 99999, expected an integer from 1 to 65535."),
        ("temperature=hot", "temperature: found 'hot', expected a number from 0 to 10."),
        ("samples=1", "samples: found 1, expected true, false or null."),
        ("checkpoints=runs", "checkpoints: found 'runs', expected a list of non-empty strings."),
        ("limits=3", "'limits=3' overrides no setting"),
    ],
)
def test_an_invalid_setting_gives_one_message(override, said):
    with pytest.raises(UserError) as caught:
        load_settings([override])
    assert str(caught.value).startswith(said)


def test_samples_are_for_the_default_store_unless_asked_for():
    assert load_settings().samples and load_settings(["store=my.duckdb", "samples=true"]).samples
    assert not load_settings(["store=my.duckdb"]).samples and not load_settings(["samples=false"]).samples


def test_prose_is_no_yaml():
    text = "# What counts\n- [short] answers: yes"
    assert load_settings([f"guidelines={text}"]).guidelines == text
    assert load_settings(["instruction=null"]).instruction is None


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds(key):
    least, most, _ = NUMBERS[key]
    for value in (least - 1, most + 1, "null", "true"):
        with pytest.raises(UserError, match=f"{key}: found"):
            load_settings([f"{key}={value}"])


def test_other_machines_are_admitted_only_with_a_password():
    for own in ("localhost", "127.0.0.1", "::1"):
        check_access(load_settings([f"address='{own}'"]), None)
    for other in ("0.0.0.0", "my.host"):
        with pytest.raises(UserError, match="COLLECT_PASSWORD is not set"):
            check_access(load_settings([f"address={other}"]), None)
        check_access(load_settings([f"address={other}"]), "secret")
