"""`verdi coordinator` commands."""

from __future__ import annotations

import sys

import click

from aiida.cmdline.commands.cmd_verdi import verdi
from aiida.cmdline.utils import decorators, echo


class CoordinatorGroup(click.Group):
    """Has the commands of the coordinator's own command line, which are loaded when one of them is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        from aiida.brokers.namedpipe import control_line

        return list(control_line.commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one of them; `None` if there is none of that name."""
        from aiida.brokers.namedpipe import control_line

        text = control_line.commands().get(cmd_name)
        if text is None:
            return None

        @decorators.requires_loaded_profile()
        @click.pass_context
        def run(ctx: click.Context, arguments: tuple[str, ...]) -> None:
            run_coordinator_command(ctx, cmd_name, *arguments)

        # What it understands, its help too, is for the coordinator's own command line to say.
        return click.Command(
            cmd_name,
            callback=run,
            params=[click.Argument(['arguments'], nargs=-1, type=click.UNPROCESSED)],
            help=f'{text[:1].upper()}{text[1:]}.',
            add_help_option=False,
            context_settings={'ignore_unknown_options': True},
        )


@verdi.group('coordinator', cls=CoordinatorGroup)
def verdi_coordinator():
    """Inspect and manage the coordinator of the named pipe broker."""


def run_coordinator_command(ctx: click.Context, command: str, *arguments: str) -> None:
    """Run a command of the coordinator's own command line on the current profile, and exit with its status."""
    import pathlib

    from aiida.brokers.namedpipe import coordinator

    profile = ctx.obj.profile
    if command in ('start', 'restart') and profile.process_control_backend not in ('core.namedpipe', 'namedpipe'):
        echo.echo_warning(f'Profile `{profile.name}` uses another broker: `verdi coordinator configure` changes that.')
    config_path = pathlib.Path(ctx.obj.config.dirpath, 'profiles', profile.name)
    # Last, so that they hold: another profile is for `verdi --profile` to name.
    given = [command, *arguments, f'--profile={profile.name}', f'--config-path={config_path}']
    sys.exit(coordinator.main(given, 'verdi coordinator'))
