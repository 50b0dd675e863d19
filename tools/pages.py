"""What mkdocs.yml asks of us while the pages are built: the documents outside docs/ are pages as well, and no public name is left out.

README.md is the first page. CHANGELOG.md, CONTRIBUTING.md and SECURITY.md are pages where they exist. Links work on the pages and in the
files, from where they are read.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}

log = logging.getLogger("mkdocs.hooks.pages")  # a warning of it ends a strict build


def outside() -> dict[str, str]:
    """File of the root → page, of those that there are."""
    return {name: page for name, page in OUTSIDE.items() if (ROOT / name).exists()}


def relinked(text: str, page: str) -> str:
    """``text`` of a page, whose links are those of the file, so that they lead to pages: ``page`` is where it is in docs/.

    What is in the repository and is no page, such as a program, keeps its name and loses the link.
    """
    source = next((name for name, other in outside().items() if other == page), None)
    here = posixpath.dirname(source if source else f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        if re.match(r"[a-z]+:", target) or not target:
            return match[0]
        file = posixpath.normpath(posixpath.join(here, target))
        if (ROOT / file).is_dir() and (ROOT / file / "README.md").exists():
            file = f"{file}/README.md"
        to = outside().get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if to is None:
            return match[1] if (ROOT / file).exists() else match[0]  # of what is nowhere, mkdocs says so
        return f"[{match[1]}]({posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    parts = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(
        part if part.startswith("```") else re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, part) for part in parts
    )


def unlisted(reference: str) -> list[str]:
    """What docs/reference.md lacks of the public names, and what it has that is none."""
    import allreduce_jit

    listed = re.findall(r"^(?:::: allreduce_jit\.|### `)(\w+)", reference, re.M)
    twice = {name for name in listed if listed.count(name) > 1}
    return sorted({*listed} ^ {*allreduce_jit.__all__} | twice)


# -- events of mkdocs


def on_config(config: Any) -> None:
    shown = str(config.nav)
    config.nav += [{page.removesuffix(".md").title(): page} for page in outside().values() if page not in shown]


def on_files(files: Any, config: Any) -> None:
    from mkdocs.structure.files import File

    for name, page in outside().items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == "reference.md":
        for name in unlisted(markdown):
            log.warning("reference.md: the public name %s is missing, named twice, or none", name)
    return relinked(markdown, page.file.src_uri)
