"""What is installed where: vendor.py, in and out of AiiDA, byte for byte; and the lists of modules."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import HERE
from vendor import DAEMON, MARK, MODULES, PRESTO, PROFILE, SETUP, TAG


def checksums(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def vendor(*arguments: object) -> int:
    return subprocess.run([sys.executable, HERE / "vendor.py", *map(str, arguments)], capture_output=True).returncode


@pytest.fixture(params=["source", "installed"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of AiiDA: the directory that holds all of it, and the path for vendor.py."""
    spec = importlib.util.find_spec("aiida")
    if spec is None or spec.origin is None:
        pytest.skip("aiida-core is not installed")
    installed = Path(spec.origin).parent
    package = tmp_path / "src" / "aiida" if request.param == "source" else tmp_path / "aiida"
    shutil.copytree(installed, package, ignore=shutil.ignore_patterns("__pycache__"))
    if request.param == "source":
        broker = "'core.rabbitmq' = 'aiida.brokers.rabbitmq.broker:RabbitmqBroker'"
        (tmp_path / "pyproject.toml").write_text(
            f"[project]\nname = 'aiida-core'\n\n[project.entry-points.'aiida.brokers']\n{broker}\n"
        )
        return tmp_path, tmp_path
    metadata = next(installed.parent.glob("aiida_core-*.dist-info"))
    shutil.copytree(metadata, tmp_path / metadata.name)
    return tmp_path, package


def test_vendor_round_trip(tree: tuple[Path, Path]) -> None:
    root, path = tree
    before = checksums(root)
    assert vendor(path, "--check") == 1
    assert checksums(root) == before
    assert vendor(path) == 0
    copied = checksums(root)
    assert len(copied) == len(before) + len(MODULES) + 2
    assert vendor(path) == 0
    assert checksums(root) == copied
    assert vendor(path, "--check") == 0
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before
    assert not list(root.rglob("*namedpipe*"))
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before


def test_vendor_never_writes_in_place_and_keeps_modes(tree: tuple[Path, Path], tmp_path: Path) -> None:
    root, path = tree
    entry_points = next(iter([*root.glob("*.dist-info/entry_points.txt"), root / "pyproject.toml"]))
    commands = next(root.rglob("cmd_verdi.py")).with_name("__init__.py")
    changed = [commands, entry_points, *root.glob("*.dist-info/RECORD")]
    for number, option in enumerate(([], ["--remove"])):
        # As installers such as uv and conda link installed files to their cache.
        linked = {file: tmp_path / f"{number}-{file.name}" for file in changed}
        before = {file: file.read_bytes() for file in changed}
        for file, link in linked.items():
            file.chmod(0o640)
            os.link(file, link)
        assert vendor(path, *option) == 0
        assert all(file.read_bytes() != before[file] for file in changed)
        assert all(link.read_bytes() == before[file] for file, link in linked.items())
        assert [oct(stat.S_IMODE(file.stat().st_mode)) for file in changed] == ["0o640"] * len(changed)


@pytest.mark.parametrize("tree", ["installed"], indirect=True)
def test_vendor_lists_what_it_writes_in_the_record(tree: tuple[Path, Path]) -> None:
    root, path = tree
    before = checksums(root)
    assert vendor(path) == 0
    (record,) = root.glob("*.dist-info/RECORD")
    written = [name for name, digest in checksums(root).items() if before.get(name) != digest]
    written.remove(str(record.relative_to(root)))
    doors = [name for name in written if "cmd_pr" in name or "cmd_daemon" in name or name.endswith("setup.py")]
    assert len(doors) in (0, 4) and len(written) == len(MODULES) + 4 + len(doors)
    expected = []
    for name in written:
        content = (root / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        expected.append(f"{name},sha256={digest},{len(content)}")
    listed = [line for line in record.read_text().splitlines() if line.split(",")[0] in written]
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("tree", ["installed"], indirect=True)
def test_vendor_leaves_the_record_of_an_edited_file_as_it_was(tree: tuple[Path, Path]) -> None:
    root, path = tree
    commands = next(root.rglob("cmd_verdi.py")).with_name("__init__.py")
    commands.write_text(f"{commands.read_text()}# by hand\n")
    before = checksums(root)
    assert vendor(path) == 0
    assert vendor(path, "--check") == 0
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before


@pytest.mark.parametrize("tree", ["installed"], indirect=True)
def test_vendor_finishes_the_record_where_it_was_interrupted(tree: tuple[Path, Path]) -> None:
    root, path = tree
    (record,) = root.glob("*.dist-info/RECORD")
    before, plain = checksums(root), record.read_bytes()
    assert vendor(path) == 0
    copied, whole = checksums(root), record.read_bytes()
    record.write_bytes(plain)
    assert vendor(path) == 0
    assert checksums(root) == copied
    record.write_bytes(plain)
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before
    record.write_bytes(whole)
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before


@pytest.mark.parametrize("what", ["foreign file", "foreign command", "no anchor", "symlink", "other entry point"])
def test_vendor_stops_before_the_first_change(tree: tuple[Path, Path], what: str) -> None:
    root, path = tree
    package = next(root.rglob("brokers")).parent
    commands = package / "cmdline" / "commands"
    entry_points = next(iter([*root.glob("*.dist-info/entry_points.txt"), root / "pyproject.toml"]))
    if what == "foreign file":
        (package / "brokers" / "namedpipe").mkdir()
        (package / "brokers" / "namedpipe" / "notes.txt").write_text("mine")
    elif what == "foreign command":
        (commands / "cmd_coordinator.py").write_text("mine")
    elif what == "no anchor":
        (commands / "__init__.py").write_text("")
    elif what == "symlink":
        (package / "brokers" / "namedpipe").symlink_to(commands)
    else:
        text = entry_points.read_text()
        other = "'core.namedpipe' = 'x:Y'" if entry_points.suffix == ".toml" else "core.namedpipe=x:Y"
        line = next(line for line in text.splitlines() if "aiida.brokers" in line and line.startswith("["))
        entry_points.write_text(text.replace(line, f"{line}\n{other}"))
    before = checksums(root)
    assert vendor(path) == 2
    assert checksums(root) == before


@pytest.mark.parametrize("what", ["edited", "removed", "draft", "outlived"])
def test_vendor_is_undone_whatever_became_of_the_copy(tree: tuple[Path, Path], what: str) -> None:
    root, path = tree
    before = checksums(root)
    assert vendor(path) == 0
    copied = checksums(root)
    copy = next(root.rglob("namedpipe"))
    module = copy / "pipebroker.py"
    if what == "edited":
        module.write_text(f"{module.read_text()}\n# by hand\n")
    elif what == "removed":
        shutil.rmtree(copy)
    elif what == "draft":
        (copy / ".pipebroker.py.namedpipe-abc_1234").write_text("half")
        next(root.rglob("cmd_verdi.py")).with_name(".cmd_profile.py.namedpipe-abc_1234").write_text("half")
        module.unlink()
    else:
        (copy / "older.py").write_bytes(MARK)
    assert vendor(path) == 0
    assert checksums(root) == copied
    if what == "edited":
        module.write_text("# Copied by vendor.py of aiida-namedpipe: change it there, not here.\n")
    assert vendor(path, "--remove") == 0
    assert checksums(root) == before
    assert not list(root.rglob("*namedpipe*"))


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), Path.mkdir])
def test_vendor_leaves_and_names_what_somebody_hides_in_the_copy(
    tree: tuple[Path, Path], make: Callable[[Path], object]
) -> None:
    root, path = tree
    assert vendor(path) == 0
    hidden = next(root.rglob("namedpipe")) / ".notes"
    make(hidden)
    copied = checksums(root)
    assert [vendor(path, *option) for option in ([], ["--check"], ["--remove"])] == [2, 2, 2]
    assert checksums(root) == copied and hidden.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can copy into what is somebody else's")
def test_vendor_gives_all_to_whom_the_tree_belongs(tree: tuple[Path, Path]) -> None:
    root, path = tree
    for each in (root, *root.rglob("*")):
        os.chown(each, 12345, 12345)
    assert vendor(path) == 0
    assert {each.stat().st_uid for each in root.rglob("*")} == {12345}
    assert vendor(path, "--remove") == 0
    assert {each.stat().st_uid for each in root.rglob("*")} == {12345}


def test_vendor_is_undone_where_the_line_beside_ours_has_changed(tree: tuple[Path, Path]) -> None:
    root, path = tree
    commands = next(root.rglob("cmd_verdi.py")).with_name("__init__.py")
    assert vendor(path) == 0
    commands.write_bytes(commands.read_bytes().replace(b"    cmd_config,\n", b"    cmd_config,  # by hand\n"))
    assert vendor(path, "--remove") == 0
    assert b"by hand" in commands.read_bytes() and b"cmd_coordinator" not in commands.read_bytes()


@pytest.mark.parametrize("what", ["line ends", "comment", "quotes", "door", "formatted"])
def test_vendor_leaves_no_line_behind_that_somebody_has_edited(tree: tuple[Path, Path], what: str) -> None:
    root, path = tree
    assert vendor(path) == 0
    file = next(root.rglob("cmd_verdi.py")).with_name("__init__.py")
    if what in ("door", "formatted"):
        file = file.with_name("cmd_presto.py")
        content = file.read_bytes()
        if TAG not in content:
            pytest.skip("this AiiDA cannot be told of a broker")
        changed = (b"--use-namedpipe", b"--use-pipes") if what == "door" else (TAG, b"\n")
        file.write_bytes(content.replace(*changed))
    elif what == "quotes":
        file = next(iter([*root.glob("*.dist-info/entry_points.txt"), root / "pyproject.toml"]))
        (line,) = (line for line in file.read_text().splitlines() if "namedpipe" in line)
        file.write_text(file.read_text().replace(line, line.replace("=", "  =  ").replace("'", '"')))
    else:
        end = b"\r" if what == "line ends" else b"  # noqa"
        file.write_bytes(file.read_bytes().replace(b"cmd_coordinator,", b"cmd_coordinator," + end))
    edited = checksums(root)
    assert vendor(path, "--remove") == 2, "it would leave what imports a module that is gone"
    assert vendor(path) == 2, "there would be two of it"
    assert checksums(root) == edited


def test_vendor_names_what_cannot_be_written(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    said = subprocess.run([sys.executable, HERE / "vendor.py", loop], capture_output=True, text=True, check=False)
    assert said.returncode == 2 and "Traceback" not in said.stderr


@pytest.mark.parametrize("tree", ["installed"], indirect=True)
def test_vendor_refuses_where_the_plugin_is(tree: tuple[Path, Path]) -> None:
    root, path = tree
    (root / "aiida_namedpipe-1.0.0.dist-info").mkdir()
    (root / "aiida_namedpipe-1.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: aiida-namedpipe\n")
    before = checksums(root)
    assert vendor(path) == 2 and checksums(root) == before
    assert vendor(path, "--remove") == 0


@pytest.mark.parametrize("tree", ["installed"], indirect=True)
def test_vendor_refuses_where_this_python_has_both(
    tree: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = tree
    (tmp_path / "user" / "aiida_namedpipe-1.0.0.dist-info").mkdir(parents=True)
    (tmp_path / "user" / "aiida_namedpipe-1.0.0.dist-info" / "METADATA").write_text("Name: aiida-namedpipe\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "user"))
    before = checksums(root)
    # One that is not this Python's does not see what this one has.
    assert vendor(path) == 0 and vendor(path, "--remove") == 0
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}{tmp_path / 'user'}")
    assert vendor(path) == 2 and checksums(root) == before


def test_upstream_says_how_many_lines_change() -> None:
    said = re.findall(
        r"^\| `cmdline/\S*?(cmd_\w+|setup)\.py` \| (\d+) \|", (HERE / "UPSTREAM.md").read_text(), re.MULTILINE
    )
    blocks = {"cmd_profile": PROFILE, "cmd_presto": PRESTO, "cmd_daemon": DAEMON, "setup": SETUP}
    lines = {name: sum(len(block.text.splitlines()) for block in each) for name, each in blocks.items()}
    assert {name: int(count) for name, count in said} == lines
