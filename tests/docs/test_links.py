"""Links of the documents: files and headings that they lead to exist, as files and as pages; addresses elsewhere are well-formed and, with
LINKS=1, answer."""

from __future__ import annotations

import os
import re
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest
from helpers import ROOT

ELSEWHERE = ("pyproject.toml", "setup.cfg", "mkdocs.yml", "CITATION.cff")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
WRITTEN = [*PAGES, *(ROOT / name for name in ELSEWHERE), *(ROOT / "docs/schemas").glob("*.json")]
OLD = {"http://www.w3.org/2000/svg"}  # a name, and no address
URL = re.compile(r"https?:[^\s)>\"'`\]]*")


def prose(text):
    """Without examples: what looks like a link there is none."""
    return re.sub(r"```.*?```|`[^`\n]*`", lambda match: "" if match[0].startswith("```") else "x", text, flags=re.S)


def slug(heading):
    """Of a heading: GitHub's for a file, and the pages' (the toc extension of Markdown) but for runs of hyphens."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ +(.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)}


def dead(path, text):
    """Relative links of a file that lead nowhere: no such file, or no such heading in it."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or not file.is_relative_to(ROOT):
            found.append(target)
        elif anchor and anchor not in anchors(text if file == path else file.read_text(encoding="utf-8")):
            found.append(target)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents(path):
    assert dead(path, path.read_text(encoding="utf-8")) == []


def test_dead_links_would_be_found():
    readme = ROOT / "README.md"
    text = "# One two\n[a](#one-two) [b](docs/glossary.md#words) [c](docs)\n```\n[no](link)\n```\n"
    assert dead(readme, text) == []
    bad = ["docs/gone.md", "docs/glossary.md#gone", "#three", "../elsewhere"]
    assert dead(readme, text + " ".join(f"[it]({one})" for one in bad)) == bad


# -- addresses elsewhere


def addresses():
    found = {}
    for path in WRITTEN:
        for url in URL.findall(path.read_text(encoding="utf-8")):
            found.setdefault(url.rstrip(".,;:"), path.relative_to(ROOT))
    return {url: path for url, path in found.items() if url not in OLD}


def malformed(url):
    """What is wrong with an address, or None."""
    parts = urlsplit(url)
    if parts.scheme != "https":
        return "not https"
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc):
        return "no public host"
    return None if re.fullmatch(r"[\w./~%+=&?#,:@-]*", url[len("https://") + len(parts.netloc) :]) else "odd characters"


def trouble(url):
    """Why an address does not answer, or None. A server that wants to see a person (401, 403, 429) is there."""
    request = urllib.request.Request(url.partition("#")[0], headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (401, 403, 429) else str(error)
    except OSError as error:
        return str(error)


def test_addresses_are_well_formed():
    found = addresses()
    assert len(found) >= 2 and {url: malformed(url) for url in found if malformed(url)} == {}


@pytest.mark.parametrize("url", ["http://docs.nvidia.com/x", "https://localhost/x", "https:/docs.nvidia.com", "https://a.org/<x>", "https://"])  # fmt: skip
def test_malformed_addresses_would_be_found(url):
    assert malformed(url) and not malformed("https://docs.nvidia.com/a/b_c.html#d-e")


@pytest.mark.skipif(os.environ.get("LINKS") != "1", reason="needs LINKS=1 and a network: asks other servers")
def test_addresses_answer():
    assert {url: why for url in addresses() if (why := trouble(url))} == {}


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        code = int(self.path.strip("/"))
        self.send_response(code)
        if code == 301:
            self.send_header("Location", "/200")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_what_does_not_answer_is_told(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        said = [trouble(f"{base}/{code}#part") for code in (200, 301, 403, 404, 500)]
        server.shutdown()
    assert said[:3] == [None] * 3 and "404" in said[3] and "500" in said[4]
    assert "refused" in trouble(base)
