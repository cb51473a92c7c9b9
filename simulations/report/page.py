"""The report as one HTML file: the document, the drawing code and the style, all within it."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corolla.simulations.report.gather import gather, gather_noise

HERE = Path(__file__).parent
SCRIPTS = ("draw.js", "series.js", "sections.js", "tables.js", "page.js")
"""Read in this order into one script."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """`out`, now a page about `runs`. Raises what `gather` raises, and OSError where it cannot be written."""
    page = render(gather(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def render_noise(noise: Mapping[str, Any], title: str) -> str:
    """A page about one `noise` object (as a round's line of metrics.jsonl has it): its plots and tables alone."""
    return render(gather_noise(noise, title))


def render(document: Mapping[str, Any]) -> str:
    """The page of a document. It allows its own script and style and nothing else, so it can load nothing."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(str(document["title"])),
        "POLICY": f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}",
        "STYLE": style,
        "DATA": json.dumps(document, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"@@([A-Z]+)@@", lambda found: parts[found[1]], template)


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
