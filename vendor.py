"""Copy the named pipe broker into AiiDA, or remove it again.

    python vendor.py PATH             copy it, or bring a copy up to date
    python vendor.py PATH --check     say whether a copy is up to date (exit status 1: no)
    python vendor.py PATH --remove    leave the tree as it was, byte for byte

PATH is an AiiDA source tree, or the directory of the installed `aiida` package.

Strategy: work out first what every file is to hold, from what it holds now; stop if anything is not as expected; only
then write. A file that AiiDA has is changed by whole lines only, so taking out the same lines, or putting back the one
that they stand for, restores it. What was interrupted is finished, or undone, by running it again.

Rules:
- What is AiiDA's or somebody else's, and not as it was left or as AiiDA has it, is never written over: it is named, and
  nothing is changed. The copied modules say in their first line where they are to be changed, and are written over.
- A file is replaced as a whole, and never written in place: installers link installed files to their cache.
- No `verdi` is left that cannot start: what AiiDA imports is there before the line that imports it, and goes after it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = (
    "files.py",
    "whose.py",
    "directories.py",
    "presence.py",
    "frames.py",
    "poller.py",
    "bodies.py",
    "fifo.py",
    "readers.py",
    "lane.py",
    "taskqueue.py",
    "claims.py",
    "burial.py",
    "strangers.py",
    "discovery.py",
    "members.py",
    "scheduler.py",
    "peers.py",
    "service.py",
    "sharing.py",
    "coordinator.py",
    "control.py",
    "control_tasks.py",
    "control_log.py",
    "control_print.py",
    "control_profiles.py",
    "control_install.py",
    "control_doctor.py",
    "control_try.py",
    "control_words.py",
    "control_commands.py",
    "control_line.py",
    "calls.py",
    "post.py",
    "holding.py",
    "subscribers.py",
    "life.py",
    "subscriptions.py",
    "engine.py",
    "pipebroker.py",
    "aiidabroker.py",
)
BROKER = "aiida.brokers.namedpipe.pipebroker:PipeBroker"
MARK = b"# Copied by vendor.py of aiida-namedpipe: change it there, not here.\n"
DRAFT = ".namedpipe-"
"""In the name of a file that is still being written, so that no other is taken for one."""
TAG = b"  # By vendor.py of aiida-namedpipe.\n"

Content = bytes | None
"""What a file holds; `None`: there is no such file."""


class Unexpected(Exception):
    """The target is not as it should be, so nothing was changed."""


@dataclass(frozen=True)
class Line:
    """A line that the broker adds to one of AiiDA's files."""

    text: bytes
    after: bytes

    def add(self, path: Path, content: bytes) -> bytes:
        """Return the content with the line.

        :raises Unexpected: the line it comes after is not there, or not only once.
        """
        lines = content.splitlines(keepends=True)
        if self.text in lines:
            return content
        self._refuse_another(path, lines)
        if lines.count(self.after) != 1:
            raise Unexpected(f"{path} should have one line {self.after.decode().strip()!r}")
        lines.insert(lines.index(self.after) + 1, self.text)
        return b"".join(lines)

    def remove(self, path: Path, content: bytes) -> bytes:
        """Return the content without the line.

        :raises Unexpected: there is another one in its place, which is not ours to remove.
        """
        lines = [line for line in content.splitlines(keepends=True) if line != self.text]
        self._refuse_another(path, lines)
        return b"".join(lines)

    def _refuse_another(self, path: Path, lines: list[bytes]) -> None:
        key = _key(self.text)
        for line in lines:
            if _key(line) == key:
                raise Unexpected(f"{path} has another line for {key.decode()}, {line!r}: take it out by hand")


def _key(line: bytes) -> bytes:
    """Return what a line is about, however it is quoted, spaced, commented or ended."""
    return re.split(rb"[=,#]", line)[0].strip(b" \t\r\n'\"")


@dataclass(frozen=True)
class Block:
    """Lines that the broker adds to one of AiiDA's modules, or has there instead of one; each says whose it is."""

    text: str
    before: str = ""
    after: str = ""
    instead: str = ""
    """The one of AiiDA's lines that they come before or after, or stand instead of."""

    def add(self, path: Path, content: bytes) -> bytes:
        """Return the content, which has none of these lines yet, with them.

        :raises Unexpected: the line that says where is not there, or not only once.
        """
        lines, anchor = content.splitlines(keepends=True), self._anchor
        if lines.count(anchor) != 1:
            raise Unexpected(f"{path} should have one line {anchor.decode().strip()!r}")
        place = lines.index(anchor)
        lines[place : place + 1] = [*([anchor] if self.after else []), self._block, *([anchor] if self.before else [])]
        return b"".join(lines)

    def remove(self, path: Path, content: bytes) -> bytes:
        """Return the content without these lines."""
        return content.replace(self._block, self._anchor if self.instead else b"")

    @property
    def _anchor(self) -> bytes:
        return f"{self.before or self.after or self.instead}\n".encode()

    @property
    def _block(self) -> bytes:
        return b"".join(line.encode() + TAG for line in self.text.splitlines())


PROFILE = (
    Block(
        """\
    elif broker == 'core.namedpipe':
        from aiida.plugins import BrokerFactory

        broker_backend, broker_config = broker, BrokerFactory(broker).get_default_config()
        echo.echo_success('Named pipe broker configured (no external service required).')
""".replace("\n\n", "\n"),
        before="    else:  # broker == 'none'",
    ),
    Block(
        """\
        from aiida.cmdline.commands.cmd_coordinator import delete_queue
        delete_queue(profile)""",
        after="        get_config().delete_profile(profile.name, delete_storage=delete_data)",
    ),
)
PRESTO = (
    Block(
        """\
    '--use-namedpipe',
    is_flag=True,
    help='When toggled on, the profile uses the named pipe broker, which requires no external services.',
)
@click.option(""",
        before="    '--no-broker',",
    ),
    Block("    use_namedpipe,", before="    no_broker,"),
    Block(
        """\
    elif use_namedpipe:
        echo.echo_report('`--use-namedpipe` enabled: configuring the profile with the named pipe broker.')
        broker_backend = 'core.namedpipe'
        broker_config = BrokerFactory(broker_backend).get_default_config()""",
        before="    elif use_zeromq:",
    ),
)
SETUP = (
    Block(
        "    type=click.Choice(['core.rabbitmq', 'core.zeromq', 'core.namedpipe', 'none']),",
        instead="    type=click.Choice(['core.rabbitmq', 'core.zeromq', 'none']),",
    ),
)
DAEMON = (
    Block(
        "        broker_lines += [str(broker)] if profile.process_control_backend == 'core.namedpipe' else []",
        before="        lines = [",
    ),
)


class Target:
    """An AiiDA to copy into."""

    def __init__(self, path: Path) -> None:
        """
        :raises Unexpected: it is no AiiDA, or not one that this broker knows how to get into.
        """
        source = path / "src" / "aiida"
        self.package = source if source.is_dir() else path
        if not (self.package / "brokers" / "broker.py").is_file():
            raise Unexpected(f"{path} is neither a source tree nor an installed package of AiiDA 2.6 or newer")
        self.copy = self.package / "brokers" / "namedpipe"
        self.command = self.package / "cmdline" / "commands" / "cmd_coordinator.py"
        self.edits: dict[Path, tuple[Line | Block, ...]] = {
            self.command.with_name("__init__.py"): (Line(b"    cmd_coordinator,\n", b"    cmd_config,\n"),),
            **self._doors(),
        }
        self.record: Path | None = None
        if source.is_dir():
            line = Line(f"'core.namedpipe' = '{BROKER}'\n".encode(), b"[project.entry-points.'aiida.brokers']\n")
            self.edits[path / "pyproject.toml"] = (line,)
            return
        metadata = list(path.parent.glob("aiida_core-*.dist-info"))
        if len(metadata) != 1:
            raise Unexpected(f"{path.parent} should have one aiida_core-*.dist-info, not {len(metadata)}")
        line = Line(f"core.namedpipe={BROKER}\n".encode(), b"[aiida.brokers]\n")
        self.edits[metadata[0] / "entry_points.txt"] = (line,)
        self.record = metadata[0] / "RECORD"

    def _doors(self) -> dict[Path, tuple[Line | Block, ...]]:
        """Return by which lines AiiDA's own commands get to know the broker: 2.9 and newer can be told."""
        profile = self.command.with_name("cmd_profile.py")
        if b"'configure-broker'" not in _read(profile):
            return {}
        return {
            profile: PROFILE,
            self.command.with_name("cmd_presto.py"): PRESTO,
            self.command.with_name("cmd_daemon.py"): DAEMON,
            self.package / "cmdline" / "params" / "options" / "commands" / "setup.py": SETUP,
        }

    def files(self) -> dict[Path, bytes]:
        """Return the files that are the broker's own, with what they are to hold."""
        files = {self.copy / name: MARK + (HERE / name).read_bytes() for name in MODULES}
        files[self.copy / "__init__.py"] = MARK + (HERE / "vendored" / "__init__.py").read_bytes()
        files[self.command] = MARK + (HERE / "vendored" / "cmd_coordinator.py").read_bytes()
        return files

    def with_broker(self) -> dict[Path, Content]:
        """Return what every file is to hold with the broker in it, in the order in which to write them."""
        self._refuse_foreign()
        self._refuse_plugin()
        changed: dict[Path, Content] = {**dict.fromkeys(self._outlived()), **self.files()}
        changed.update({path: _with(path, edits) for path, edits in self.edits.items()})
        return self._with_record(changed)

    def without_broker(self) -> dict[Path, Content]:
        """Return what every file is to hold without the broker, in the order in which to write them."""
        self._refuse_foreign()
        changed: dict[Path, Content] = {path: _without(path, edits) for path, edits in self.edits.items()}
        changed.update(dict.fromkeys([*self._outlived(), *self.files()]))
        return self._with_record(changed)

    def remove_leavings(self) -> None:
        """Remove what Python made of the broker's files, and the directory."""
        for compiled in (self.command.parent / "__pycache__").glob(f"{self.command.stem}.*.pyc"):
            compiled.unlink()
        shutil.rmtree(self.copy / "__pycache__", ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.copy.rmdir()

    def remove_drafts(self) -> None:
        """Remove what a copying that was killed has left."""
        for draft in self._drafts():
            draft.unlink()

    def _present(self) -> set[Path]:
        if self.copy.exists() and not self.copy.is_dir():
            raise Unexpected(f"{self.copy} is there, and is no directory")
        return set(self.copy.iterdir()) if self.copy.is_dir() else set()

    def _drafts(self) -> set[Path]:
        changed = [self.command, *self.edits, *([self.record] if self.record else [])]
        drafts = {draft for path in changed for draft in path.parent.glob(f".{path.name}{DRAFT}*")}
        drafts |= {path for path in self._present() if path.name.startswith(".") and DRAFT in path.name}
        return {path for path in drafts if path.is_file() and not path.is_symlink()}

    def _outlived(self) -> set[Path]:
        """Return the modules of an earlier edition that this one does not have."""
        return self._present() - self._drafts() - {self.copy / "__pycache__"} - self.files().keys()

    def _refuse_foreign(self) -> None:
        present = self._present() - self._drafts() - {self.copy / "__pycache__"}
        for path in sorted(present | {self.command, self.copy, *self.edits}):
            if path.is_symlink():
                raise Unexpected(f"{path} is a symlink")
            own = path.is_file() and path.read_bytes().startswith(MARK)
            if path in present | {self.command} and path.exists() and not own:
                raise Unexpected(f"{path} is there, and did not come from here")

    def _refuse_plugin(self) -> None:
        # Whatever this Python can import beside it, if it is this Python's.
        place = os.path.realpath(self.package.parent)
        ours = self.record is None or place in map(os.path.realpath, sys.path)
        beside = sys.path if ours else [place]
        if any(importlib.metadata.distributions(name="aiida-namedpipe", path=beside)):
            raise Unexpected(
                "the plugin is installed there, and two brokers of one name would break every verdi: run "
                "'pip uninstall aiida-namedpipe' first"
            )

    def _with_record(self, changed: dict[Path, Content]) -> dict[Path, Content]:
        """Add what the installer's RECORD is to hold, so that uninstalling AiiDA leaves nothing behind."""
        if self.record is None:
            return changed
        record = _read(self.record)
        if not record.endswith(b"\n"):
            raise Unexpected(f"{self.record} should end with a whole line")
        end = b"\r\n" if record.endswith(b"\r\n") else b"\n"
        lines = record.splitlines(keepends=True)
        for path, after in changed.items():
            entry = self._entry(path, after) + end
            if path in self.edits:
                # What somebody had edited before is not as the record says, and stays so.
                known = [self._entry(path, content) + end for content in self._states(path)]
                lines = [entry if line in known else line for line in lines]
            else:
                # By its name: somebody may have edited the file since, or removed it.
                name = entry.split(b",")[0] + b","
                lines = [line for line in lines if not line.startswith(name)]
                lines += [entry] if after is not None else []
        return {**changed, self.record: b"".join(lines)}

    def _states(self, path: Path) -> list[bytes]:
        """Return what a file of AiiDA's holds without the broker, and with it if it still has the lines for that."""
        edits = self.edits[path]
        states = [_without(path, edits)]
        with contextlib.suppress(Unexpected):
            states.append(_with(path, edits))
        return states

    def _entry(self, path: Path, content: Content) -> bytes:
        name = path.relative_to(self.package.parent).as_posix()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content or b"").digest()).rstrip(b"=")
        return b"%s,sha256=%s,%d" % (name.encode(), digest, len(content or b""))


def _without(path: Path, edits: tuple[Line | Block, ...]) -> bytes:
    """Return what a file of AiiDA's holds without the broker.

    :raises Unexpected: somebody has edited what the broker has there.
    """
    content = _read(path)
    for edit in edits:
        content = edit.remove(path, content)
    if b"namedpipe" in content:
        raise Unexpected(f"{path} has lines about namedpipe that are not as they were written: take them out by hand")
    return content


def _with(path: Path, edits: tuple[Line | Block, ...]) -> bytes:
    """Return what a file of AiiDA's holds with the broker.

    :raises Unexpected: somebody has edited what the broker has there, or the lines that it comes beside.
    """
    content = _without(path, edits)
    for edit in edits:
        content = edit.add(path, content)
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unexpected(f"{path} cannot be read: {error.strerror}") from error


def outdated(contents: dict[Path, Content]) -> list[Path]:
    """Return the files that do not hold what they are to hold."""
    return [path for path, content in contents.items() if (path.read_bytes() if path.exists() else None) != content]


def write(contents: dict[Path, Content], say: Callable[[str], None]) -> None:
    """Make the files hold what they are to hold.

    :raises Unexpected: one of them cannot be written; nothing was changed.
    """
    paths = outdated(contents)
    for path in paths:
        parent = path.parent if path.parent.exists() else path.parent.parent
        if not os.access(parent, os.W_OK):
            raise Unexpected(f"{parent} is not writable")
    for path in paths:
        content = contents[path]
        if content is None:
            path.unlink()
            say(f"removed {path}")
            continue
        if not path.parent.exists():
            path.parent.mkdir()
            _give(path.parent, path.parent.parent)
        # Never in place: installers such as uv and conda hard-link installed files to their cache.
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{DRAFT}")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            _give(draft, path if path.exists() else path.parent)
            if path.exists():
                shutil.copymode(path, draft)
            else:
                os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        say(f"wrote {path}")


def _give(path: Path | str, like: Path) -> None:
    """Let a file have the owner of another one: root may copy into what is somebody else's."""
    status = like.stat()
    with contextlib.suppress(OSError):  # In some containers, an owner is nobody whom one could name.
        os.chown(path, status.st_uid, status.st_gid)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # Whoever reads this may have gone, and the work is to be done all the same.
        print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="source tree, or installed package, of AiiDA")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit status 1 if not up to date")
    mode.add_argument("--remove", action="store_true", help="remove the broker")
    arguments = parser.parse_args(argv)
    try:
        target = Target(arguments.path.resolve())
        if arguments.check:
            paths = outdated(target.with_broker())
            _say("\n".join(f"not up to date: {path}" for path in paths) or "up to date")
            return 1 if paths else 0
        write(target.without_broker() if arguments.remove else target.with_broker(), _say)
        target.remove_drafts()
        if arguments.remove:
            target.remove_leavings()
        elif target.record is None:
            _say("AiiDA finds the broker once this tree is installed (again): pip install -e .")
    except Unexpected as error:
        print(f"vendor.py: {error}; nothing was changed", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"vendor.py: {error}; run it again when that is mended, to finish or to undo", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vendor.py: interrupted; run it again, to finish or to undo", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
