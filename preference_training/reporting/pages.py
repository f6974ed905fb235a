"""A page in one file: from a template of pages/, with style and script in it, and nothing that is asked of anybody else.

What comes from runs is text and never markup: templates escape it, and the page's policy lets no script run but its own.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

from preference_training.core.files import write_atomically
from preference_training.core.secrets import without_secrets

FOLDER = Path(__file__).parent / "page_templates"


def page(template: str, **values) -> str:
    """The HTML of a template, without what looks like a secret. Texts among the values are escaped; `Markup` is markup."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    return without_secrets(_environment().get_template(template).render(values, policy=policy, script=script, style=style))


@cache
def _environment():
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, html: str) -> None:
    """Write a page as a whole: a browser never reads half of it. Raises OSError."""
    write_atomically(path, html)
