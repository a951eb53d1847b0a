"""Does every link of the built book lead somewhere, and does nothing come from outside?"""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "video": "src"}
STYLES = {"stylesheet", "icon", "preload", "manifest"}


class Page(HTMLParser):
    """What one page defines, links to and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loads, self.silent = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        has = dict(attrs)
        self.anchors |= {has[name] for name in ("id", "name") if has.get(name)}
        if tag == "a" and has.get("href"):
            self.links.append(has["href"])
        if has.get(LOADED.get(tag)):
            self.loads.append(has[LOADED[tag]])
        if tag == "link" and STYLES & set(has.get("rel", "").split()):
            self.loads.append(has["href"])
        if tag == "img" and not has.get("alt", "").strip():
            self.silent.append(has.get("src"))


@cache
def parsed(path: Path) -> Page:
    return Page(path.read_text())


def outside(address: str) -> bool:
    return bool(urlsplit(address).scheme or address.startswith("//"))


def missing(path: Path, address: str) -> bool:
    """Is the file or the anchor that a relative address names not there?"""
    parts = urlsplit(address)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return True
    anchor = unquote(parts.fragment)
    return bool(anchor) and target.suffix == ".html" and anchor not in parsed(target).anchors


def problems(folder: Path) -> list[str]:
    """A line for each link into nothing, each thing loaded from elsewhere, each image without alternative text."""
    found = []
    for path in sorted(folder.resolve().rglob("*.html")):
        page, name = parsed(path), path.relative_to(folder.resolve())
        found += [f"{name}: loads {address}" for address in page.loads if outside(address) and address[:5] != "data:"]
        inside = [address for address in [*page.links, *page.loads] if not outside(address)]
        found += [f"{name}: {address} is not there" for address in dict.fromkeys(inside) if missing(path, address)]
        found += [f"{name}: {address} has no alternative text" for address in page.silent]
    for path in sorted(folder.resolve().rglob("*.css")):
        addresses = re.findall(r"(?:url\(|@import )['\"]?((?:https?:)?//[^'\")\s]+)", path.read_text())
        found += [f"{path.relative_to(folder.resolve())}: loads {address}" for address in addresses]
    return found
