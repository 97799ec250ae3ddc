"""Make the figures of the pages by running the pages' own Python blocks: ``python docs/gallery.py [PAGE.md]...``.

Figures lie in ``docs/_figures/PAGE/`` and are made again when the page or the package has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
FIGURES = DOCS / "_figures"
_IMAGE = re.compile(r"^!\[[^\]]*\]\((?:\.\./)?_figures/([\w-]+)/([\w.-]+)\).*$\n?", flags=re.MULTILINE)
_KEY = "made-from.json"


def pages() -> list[Path]:
    """The pages that contain generated figures."""
    return [path for path in sorted(DOCS.glob("**/*.md")) if _IMAGE.search(path.read_text(encoding="utf-8"))]


def make(page: Path, force: bool = False) -> Path:
    """Run the page's blocks in its folder of figures, unless they are up to date; returns the folder."""
    from docs.tools.blocks import run_page  # here, so that pages can be listed without the package

    folder, key = FIGURES / page.stem, _key(page)
    if not force and _record(page).get("key") == key:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        skipped = run_page(page)
    (folder / _KEY).write_text(json.dumps({"key": key, "skipped": skipped}))
    return folder


def without_missing(page: Path, text: str) -> str:
    """The page without the figures of blocks that could not be run."""
    if not _record(page).get("skipped"):
        return text
    return _IMAGE.sub(lambda match: match[0] if (FIGURES / match[1] / match[2]).is_file() else "", text)


def _record(page: Path) -> dict[str, object]:
    file = FIGURES / page.stem / _KEY
    return json.loads(file.read_text()) if file.is_file() else {}


def _key(page: Path) -> str:
    """A hash of everything that the page's figures depend on."""
    digest = hashlib.sha256(page.read_bytes())
    for package in ("pnanalysis", "trainers"):
        for file in sorted((DOCS.parent / package).glob("**/*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    for path in [Path(name) for name in sys.argv[1:]] or pages():
        print(make(path.resolve(), force=True))
