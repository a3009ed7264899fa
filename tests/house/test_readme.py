"""What README.md and docs/ show is what runs: every ```python block, and every command that is named.

A page shortens a long run for this test, and only for it, by an invisible line such as
`<!-- test: steps=2000 => steps=2 -->`.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from forked import run_script

import functrain as ft

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
SHELL = {"sh", "bash", "console", "shell"}
SHORTER = re.compile(r"^<!-- test: (.+?) => (.+?) -->$", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block of a page."""
    return FENCE.findall(page.read_text())


def programs(page: Path) -> str:
    """Return a page's python blocks as one program: later blocks go on from earlier ones.

    Lines keep their numbers, so that an error names the page's line.
    Raises: ValueError if a `<!-- test: ... -->` line shortens nothing.
    """
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        if block[1] == "python":
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    program = "\n".join(lines) + "\n"
    for long, short in SHORTER.findall(text):
        if long not in program:
            raise ValueError(f"{page.name}: the test line shortens {long!r}, which no python block holds")
        program = program.replace(long, short)
    return program


def commands(page: Path) -> list[str]:
    """Return the shell lines of a page that call this project: `make ...`, `functrain ...`, `python FILE`, and those
    of functrain within its sentences."""
    found = []
    text = page.read_text()
    shell = [body for language, body in FENCE.findall(text) if language in SHELL]
    prose = FENCE.sub("", text)
    indented = [line[4:] for line in re.findall(r"^    \S.*$", prose, re.MULTILINE)]
    within = [" ".join(words.split()) for words in re.findall(r"`(functrain\s[^`]+)`", prose)]
    for line in "\n".join([*shell, *indented, *within]).splitlines():
        line = line.split("#")[0].strip().removeprefix("$ ").strip()
        if re.match(r"(make|functrain|python3?|pip)\s", line):
            found.append(line)
    return found


def missing(command: str, root: Path) -> str | None:
    """Say what a command names that does not exist, or None."""
    words = shlex.split(re.split(r"\s[>&|](?:\s|$)", command)[0])
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", (root / "Makefile").read_text(), re.MULTILINE)
        wrong = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"make has no target {wrong[0]}" if wrong else None
    if words[0] == "functrain":
        from functrain.cli import COMMANDS

        if words[1] not in COMMANDS:
            return None if words[1].startswith("-") else f"functrain has no command {words[1]}"
        # as the name of a command alone is said in a sentence
        return refused(words[1], words[2:]) if words[2:] else None
    if words[0].startswith("python") and words[1].endswith(".py"):
        return None if (root / words[1]).is_file() else f"no file {words[1]}"
    return None


def refused(command: str, words: list[str]) -> str | None:
    """Say what a command of functrain has against its words, or None; what it would do is not done."""
    from functrain.cli import options, train
    from functrain.recipes import sweep
    from functrain.recipes.config import Config

    module = importlib.import_module(f"functrain.cli.{command}")
    words = ["tiny" if word in ("PRESET", "RUN|PRESET") else word for word in words]
    try:
        if command == "train":
            _, over = train.asked(words)
            if over:
                sweep.check(over)
        elif command == "profile":
            options.parse(
                module.Options, words[1:], prog=command, description="", default=module.Options(config=Config())
            )
        else:
            options.parse(module.Options, words, prog=command, description="")
    except ValueError as error:
        return f"functrain {command} {' '.join(words)}: {error}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_code_runs(page, tmp_path):
    program = programs(page)
    if not program.strip():
        return
    file = tmp_path / page.with_suffix(".py").name
    file.write_text(program)
    done = run_script(file, folder=tmp_path)
    assert done.returncode == 0, f"{page.name}: {done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_pages_commands_exist(page):
    assert [found for command in commands(page) if (found := missing(command, ROOT))] == []


def unknown(page: Path) -> list[str]:
    """Return the names below `ft.` that a page says and the library does not have."""
    found = []
    for name in sorted(set(re.findall(r"\bft((?:\.[a-zA-Z_]\w*)+)", page.read_text()))):
        place = ft
        try:
            for part in name[1:].split("."):
                place = getattr(place, part)
        except AttributeError:
            found.append(f"ft{name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_that_a_page_says_exist(page):
    assert unknown(page) == []


def test_a_name_that_does_not_exist_is_found(tmp_path):
    (tmp_path / "page.md").write_text("`ft.optim.adamw`, or `ft.train.earlystopping(...)`; ft.losses.Loss.total")
    assert unknown(tmp_path / "page.md") == ["ft.train.earlystopping"]


def test_a_wrong_command_is_found(tmp_path):
    (tmp_path / "Makefile").write_text("train:\n\ttrue\n")
    page = tmp_path / "page.md"
    shell = "functrain trian tiny\n$ python no/such.py --x\nls\nmake train RUN=a # b"
    page.write_text(f"    make tarin\n\n```sh\n{shell}\n```\n")
    assert commands(page) == ["functrain trian tiny", "python no/such.py --x", "make train RUN=a", "make tarin"]
    found = [missing(command, tmp_path) for command in commands(page)]
    assert found == ["functrain has no command trian", "no file no/such.py", None, "make has no target tarin"]


def test_a_wrong_option_or_preset_of_a_command_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`functrain train PRESET --sweep learning_rate=1,2`, `functrain train PRESET --sweep rate=1`, `functrain\n"
        "train small`, `functrain train tiny --data.corpus a --optimizer.name muno`, `functrain presets tiny > FILE`\n"
        "```sh\nfunctrain export runs/tiny\nfunctrain profile runs/tiny --active 3 &\n```\n"
    )
    found = [missing(command, ROOT) for command in commands(page)]
    assert [text is not None for text in found] == [True, False, False, True, True, True, False]
    for text, words in zip(
        filter(None, found), ("--to", "'rate' is no number", "no preset 'small'", "muno"), strict=True
    ):
        assert words in text


def test_a_programs_line_numbers_are_the_pages(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\na = 1\n```\ntext\n```text\nno\n```\n```python\nassert a == 1\n```\n")
    assert programs(page).splitlines()[3] == "a = 1" and programs(page).splitlines()[10] == "assert a == 1"
    exec(compile(programs(page), "page", "exec"), {})


def test_a_page_shortens_its_program_for_the_test(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- test: steps=2000 => steps=2 -->\n```python\nfit(steps=2000)\n```\n")
    assert "fit(steps=2)" in programs(page)
    page.write_text("<!-- test: steps=20 => steps=2 -->\n```python\nfit()\n```\n")
    with pytest.raises(ValueError, match="steps=20"):
        programs(page)
