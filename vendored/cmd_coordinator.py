"""`verdi coordinator` commands, and `verdi profile configure-broker core.namedpipe`."""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
import shlex
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
        def run_for_profile(ctx: click.Context, arguments: list[str]) -> int:
            return run_coordinator_command(ctx.obj.profile, name, *arguments)

        @click.pass_context
        def run(ctx: click.Context, arguments: tuple[str, ...]) -> None:
            given = ['--json', *arguments] if ctx.parent.params['as_json'] else list(arguments)
            # Of no profile, and on a machine where there is none yet.
            options = itertools.takewhile(lambda word: word != '--', given)
            if name == 'list' or {'-h', '--help'} & set(options):
                sys.exit(_main(name, given, ('', pathlib.Path())))
            sys.exit(run_for_profile(ctx, given))

        super().__init__(
            name,
            callback=run,
            params=[click.Argument(['arguments'], nargs=-1, type=click.UNPROCESSED, shell_complete=self._values)],
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

    def _values(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        """Return the choices that begin so of the option before."""
        before = set(ctx.params['arguments'][-1:])
        choices = (action.choices or () for action in self._parser._actions if before & set(action.option_strings))
        return [choice for each in choices for choice in each if choice.startswith(incomplete)]


class CoordinatorGroup(click.Group):
    """Has the commands of the coordinator's own command line, which are loaded when one of them is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return list(_parsers())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one of them; `None` if there is none of that name."""
        parser = _parsers().get(cmd_name)
        return CoordinatorCommand(cmd_name, parser) if parser is not None else None


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        sys.exit(_main('--version', [], ('', pathlib.Path())))


@verdi.group('coordinator', cls=CoordinatorGroup)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON, one object a line.')
@click.option(
    '--version',
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the broker's version.",
)
def verdi_coordinator(as_json):
    """Inspect and manage the coordinator of the named pipe broker."""


def _main(command: str, arguments: list[str], where: tuple[str, pathlib.Path]) -> int:
    from aiida.brokers.namedpipe import coordinator

    return coordinator.main([command, *arguments], PROG, where)


def run_coordinator_command(profile: Profile, command: str, *arguments: str) -> int:
    """Run a command of the coordinator's own command line; return its exit status."""
    if command in ('start', 'restart') and profile.process_control_backend != 'core.namedpipe':
        change = f'verdi -p {profile.name} coordinator configure'
        echo.echo_warning(f'Profile `{profile.name}` uses another broker: `{change}` changes that.')
    # Another profile is for `verdi --profile` to name.
    return _main(command, list(arguments), (profile.name, _directory(profile)))


def delete_queue(profile: Profile) -> None:
    """Delete the queue and the pipes of a profile that is deleted."""
    from aiida.brokers.namedpipe import control_install, directories, files, whose

    layout = directories.locate(_directory(profile))
    if layout is None:
        return
    try:
        said = directories.read_format(_directory(profile))
        if said and not whose.Owner(profile.name, profile.uuid).is_of(said):
            echo.echo_warning(f"{layout.queue} is the queue of the profile '{said.get('profile')}', and is left.")
            return
        control_install.delete(_directory(profile))
    except (RuntimeError, OSError) as error:
        paths = (layout.queue, layout.registry, layout.pipes)
        remove = shlex.join(['rm', '-r', *(str(path) for path in paths if path.exists())])
        why = files.told(error).rstrip('.')
        echo.echo_warning(
            f'What the named pipe broker has of `{profile.name}` is left: {why}. '
            f'When nothing of that profile runs any more, `{remove}` removes it.'
        )


def _finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f'{value} is no number of seconds.', ctx, parameter)
    return value


def _directory(profile: Profile) -> pathlib.Path:
    return pathlib.Path(get_config().dirpath, 'profiles', profile.name)


# AiiDA before 2.9 has no such group.
if hasattr(cmd_profile, 'profile_configure_broker'):

    @cmd_profile.profile_configure_broker.command('core.namedpipe')
    @arguments.PROFILE(default=defaults.get_default_profile)
    @options.FORCE()
    @click.option('--autostart/--no-autostart', default=True, help='Whether a coordinator is started when needed.')
    @click.option(
        '--idle',
        type=click.FloatRange(0),
        callback=_finite,
        help='After how many seconds without anybody such a one ends.',
    )
    @options.NON_INTERACTIVE()
    def profile_configure_broker_namedpipe(profile, force, autostart, idle, non_interactive):
        """Configure named pipes for a profile: there is nothing to be asked, and no server."""
        if profile is None:
            echo.echo_critical('no profile to configure')
        given = [] if autostart else ['--no-autostart']
        given += [f'--idle={idle}'] if idle is not None else []
        sys.exit(run_coordinator_command(profile, 'configure', *given))
