"""Self-contained HTML pages from the templates in this folder, with style and script inline and no external requests.

Values from runs are text, never markup: templates escape them, and the content security policy allows only the page's script.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

from preference_training.core.secrets import without_secrets

FOLDER = Path(__file__).parent


def render(template: str, **values) -> str:
    """Render a template to HTML and redact secrets. Strings are escaped; `Markup` is not."""
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
