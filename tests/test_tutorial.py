"""TUTORIAL.md: each block is run, in order, and prints what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness import HERE, TIMEOUT

TUTORIAL = (HERE / "TUTORIAL.md").read_text()
LONGEST = 30


def blocks() -> list[tuple[str, str]]:
    """Return the blocks: what each is, and its text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)


def test_each_block_is_short_and_has_a_name() -> None:
    for kind, text in blocks():
        assert kind in ("python", "console")
        if kind == "python":
            assert re.match(r"# \w+\.py\n", text)
            assert len([line for line in text.splitlines()[1:] if line]) <= LONGEST, text.splitlines()[0]


def test_nine_steps_and_what_is_still_wrong() -> None:
    steps = re.split(r"^## (?=\d)", TUTORIAL, flags=re.MULTILINE)[1:]
    assert [int(step[0]) for step in steps] == list(range(1, 10))
    assert all("Still wrong:" in step for step in steps[:-1])


def knows_where_a_file_lies(directory: Path) -> bool:
    """Say whether the file system tells where on the disk a file is."""
    (_, text), *_ = [block for block in blocks() if block[1].startswith("# on_disk.py")]
    script = text + "\n    print(has_a_place(os.open('probe', os.O_RDWR | os.O_CREAT)))"
    said = subprocess.run([sys.executable, "-c", script], check=False, cwd=directory, capture_output=True, text=True)
    return said.returncode == 0 and "place for them: False" in said.stdout


def test_every_block_prints_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "probed").mkdir()
    tells = knows_where_a_file_lies(tmp_path / "probed")
    for kind, text in blocks():
        if kind == "python":
            name, _, code = text.partition("\n")
            (tmp_path / name.removeprefix("# ")).write_text(code)
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            if "on_disk" in command and not tells:
                continue
            words = [sys.executable if word == "python" else word for word in shlex.split(command)]
            environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
            said = subprocess.run(
                words, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, env=environment
            )
            assert (said.stdout, said.stderr, said.returncode) == (expected, "", 0), command
    if not tells:
        pytest.skip("this file system does not tell what the disk has; all else was run")


def test_the_lines_of_the_real_modules_are_there() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+\.py)` \| `(.*)` \|$", TUTORIAL, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == list(range(1, 10))
    for _, module, line in rows:
        lines = [each.strip() for each in (HERE / module).read_text().splitlines()]
        assert line.replace("\\|", "|") in lines, (module, line)
