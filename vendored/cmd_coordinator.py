"""`verdi coordinator` commands, and `verdi profile configure-broker core.namedpipe`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from aiida.cmdline.commands import cmd_profile
from aiida.cmdline.commands.cmd_verdi import verdi
from aiida.cmdline.params import arguments, options
from aiida.cmdline.utils import decorators, defaults, echo
from aiida.manage.configuration import get_config

if TYPE_CHECKING:
    from aiida.manage.configuration import Profile

PROG = 'verdi coordinator'


def _parsers() -> dict[str, argparse.ArgumentParser]:
    from aiida.brokers.namedpipe import control_line

    return control_line.parsers(PROG, with_profile=False)[1]


class CoordinatorCommand(click.Command):
    """One of the coordinator's own commands: what it understands, its help too, is for its own parser to say."""

    def __init__(self, name: str, parser: argparse.ArgumentParser) -> None:
        @decorators.requires_loaded_profile()
        @click.pass_context
        def run(ctx: click.Context, arguments: tuple[str, ...]) -> None:
            sys.exit(run_coordinator_command(ctx.obj.profile, name, *arguments))

        super().__init__(
            name,
            callback=run,
            params=[click.Argument(['arguments'], nargs=-1, type=click.UNPROCESSED)],
            help=parser.description,
            add_help_option=False,
        )
        self._parser = parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leave all of them to that parser."""
        ctx.params = {'arguments': tuple(args)}
        return []

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the options that begin so."""
        found = super().shell_complete(ctx, incomplete)
        for action in self._parser._actions:
            names = [name for name in action.option_strings if name.startswith(incomplete)]
            found += [CompletionItem(name, help=action.help) for name in names]
        return found


class CoordinatorGroup(click.Group):
    """Has the commands of the coordinator's own command line, which are loaded when one of them is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return list(_parsers())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one of them; `None` if there is none of that name."""
        parser = _parsers().get(cmd_name)
        return CoordinatorCommand(cmd_name, parser) if parser is not None else None


@verdi.group('coordinator', cls=CoordinatorGroup)
def verdi_coordinator():
    """Inspect and manage the coordinator of the named pipe broker."""


def run_coordinator_command(profile: Profile, command: str, *arguments: str) -> int:
    """Run a command of the coordinator's own command line; return its exit status."""
    from aiida.brokers.namedpipe import coordinator

    if command in ('start', 'restart') and profile.process_control_backend != 'core.namedpipe':
        change = f'verdi -p {profile.name} coordinator configure'
        echo.echo_warning(f'Profile `{profile.name}` uses another broker: `{change}` changes that.')
    # Another profile is for `verdi --profile` to name.
    return coordinator.main([command, *arguments], PROG, (profile.name, _directory(profile)))


def delete_queue(profile: Profile) -> None:
    """Delete the queue and the pipes of a profile that is deleted."""
    from aiida.brokers.namedpipe import control_install, directories

    if directories.locate(_directory(profile)) is None:
        return
    try:
        control_install.delete(_directory(profile))
    except (RuntimeError, OSError) as error:
        echo.echo_warning(f'What the named pipe broker has of `{profile.name}` is left: {error}')


def _directory(profile: Profile) -> pathlib.Path:
    return pathlib.Path(get_config().dirpath, 'profiles', profile.name)


# AiiDA before 2.9 has no such group.
if hasattr(cmd_profile, 'profile_configure_broker'):

    @cmd_profile.profile_configure_broker.command('core.namedpipe')
    @arguments.PROFILE(default=defaults.get_default_profile)
    @options.FORCE()
    @click.option('--autostart/--no-autostart', default=True, help='Whether a coordinator is started when needed.')
    @click.option('--idle', type=click.FloatRange(0), help='After how many seconds without anybody such a one ends.')
    @options.NON_INTERACTIVE()
    def profile_configure_broker_namedpipe(profile, force, autostart, idle, non_interactive):
        """Configure named pipes for a profile: there is nothing to be asked, and no server."""
        if profile is None:
            echo.echo_critical('no profile to configure')
        given = [] if autostart else ['--no-autostart']
        given += [f'--idle={idle}'] if idle is not None else []
        sys.exit(run_coordinator_command(profile, 'configure', *given))
