"""docs/layers.svg: the packages in the order of the data, and which of them imports which, drawn from the code.

python scripts/layers_picture.py [--check]

--check writes nothing, and exits with status 1 where the picture is not what this script draws.
"""

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "preference_training"
PICTURE = ROOT / "docs" / "layers.svg"
# Sizes in the picture. Unit: pixels.
WIDTH, TOP, ROW, LEFT, MATRIX, CELL = 1180, 150, 30, 30, 600, 30

STYLE = """
.ground{fill:#fbfbf8} .band{fill:#eff1ee} .dot{fill:#1f77b4} .own{fill:#d5d8d2}
text{fill:#22262e;font:14px system-ui,sans-serif} .title{font-weight:600;font-size:16px} .small{font-size:12px;fill:#5b6270}
@media (prefers-color-scheme:dark){.ground{fill:#1c1f26} .band{fill:#252932} .dot{fill:#5aa2dc} .own{fill:#3c424e}
text{fill:#e8eaee} .small{fill:#a9b0bd}}
"""


def layers() -> list[str]:
    """The packages that there are, from the one that imports no other to the one that none imports."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [names] = [contract["layers"] for contract in contracts if contract.get("containers") == [PACKAGE.name]]
    return [name for name in (layer.strip("()") for layer in reversed(names)) if (PACKAGE / name).is_dir()]


def packages_imported(package: Path) -> set[str]:
    """The packages of which the modules of a package import something; command lines may import any."""
    modules = [module for module in package.rglob("*.py") if module.stem != "__main__"]
    nodes = [node for module in modules for node in ast.walk(ast.parse(module.read_text()))]
    parts = [(node.module or "").split(".") for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name[1] for name in parts if name[0] == PACKAGE.name and len(name) > 1}


def row(number: int, name: str, names: list[str]) -> list[str]:
    """One package: its name, what it is for, and a dot for each that it imports."""
    imported = packages_imported(PACKAGE / name)
    purpose = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())).split(":")[0].rstrip(".")
    y, width = TOP + number * ROW, WIDTH - 2 * LEFT + 20
    parts = [f'<rect class="band" x="{LEFT - 10}" y="{y}" width="{width}" height="{ROW}"/>'] if number % 2 else []
    parts.append(f'<text x="{LEFT}" y="{y + 20}">{name}</text>')
    parts.append(f'<text class="small" x="{LEFT + 120}" y="{y + 20}">{escape(purpose)}</text>')
    for column, other in enumerate(names):
        x = MATRIX + column * CELL + CELL / 2
        if other == name:
            parts.append(f'<rect class="own" x="{x - 6}" y="{y + 9}" width="12" height="12" rx="2"/>')
        elif other in imported:
            parts.append(f'<circle class="dot" cx="{x}" cy="{y + 15}" r="6"><title>{name} imports {other}</title></circle>')
    return parts


def picture() -> str:
    """The whole SVG."""
    names = layers()
    height = TOP + len(names) * ROW + 30
    title = "The packages in the order of the data, and what each imports"
    columns = [
        f'<text class="small" transform="translate({MATRIX + k * CELL + 20} {TOP - 8}) rotate(-55)">{name}</text>'
        for k, name in enumerate(names)
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="10"/>',
        f'<text class="title" x="{LEFT}" y="40">{title}</text>',
        f'<text class="small" x="{LEFT}" y="64">A dot: the package of the row imports that of the column.</text>',
        f'<text class="small" x="{LEFT}" y="84">Right of the diagonal there is none: imports lead up this list, only.</text>',
        *columns,
        *(part for number, name in enumerate(names) for part in row(number, name, names)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the picture, or look whether it is as drawn here."""
    from generated import write_or_check

    write_or_check(PICTURE, picture())


if __name__ == "__main__":
    main()
