"""`verdi coordinator` commands."""

from __future__ import annotations

import sys

import click

from aiida.cmdline.commands.cmd_verdi import verdi
from aiida.cmdline.utils import decorators, echo


@verdi.group('coordinator')
def verdi_coordinator():
    """Inspect and manage the coordinator of the named pipe broker."""


def run_coordinator_command(ctx: click.Context, *arguments: str) -> None:
    """Run a command of the coordinator's own command line on the current profile, and exit with its status."""
    import pathlib

    from aiida.brokers.namedpipe import coordinator

    profile = ctx.obj.profile
    config_path = pathlib.Path(ctx.obj.config.dirpath, 'profiles', profile.name)
    sys.exit(coordinator.main([f'--profile={profile.name}', f'--config-path={config_path}', *arguments]))


def warn_other_broker(profile) -> None:
    """Warn if the profile uses another broker, for which a coordinator is of no use."""
    if profile.process_control_backend not in ('core.namedpipe', 'namedpipe'):
        echo.echo_warning(f'Profile `{profile.name}` uses another broker: `verdi coordinator configure` changes that.')


@verdi_coordinator.command()
@click.option('--foreground', is_flag=True, help='Run in foreground.')
@click.pass_context
@decorators.requires_loaded_profile()
def start(ctx, foreground):
    """Start the coordinator.

    Returns exit code 0 once the coordinator serves, non-zero if it does not, or if one is running already.
    """
    warn_other_broker(ctx.obj.profile)
    run_coordinator_command(ctx, 'start', *(['--foreground'] if foreground else []))


@verdi_coordinator.command()
@click.pass_context
@decorators.requires_loaded_profile()
def stop(ctx):
    """Stop the coordinator.

    Returns exit code 0 if the coordinator was stopped (or was not running), non-zero if there was an error.
    """
    run_coordinator_command(ctx, 'stop')


@verdi_coordinator.command()
@click.pass_context
@decorators.requires_loaded_profile()
def restart(ctx):
    """Restart the coordinator.

    Returns exit code 0 if the coordinator is running, non-zero if there was an error.
    """
    warn_other_broker(ctx.obj.profile)
    run_coordinator_command(ctx, 'restart')


@verdi_coordinator.command()
@click.pass_context
@decorators.requires_loaded_profile()
def status(ctx):
    """Print the status of the coordinator, its workers and its tasks.

    Returns exit code 0 if the coordinator is running, else exit code 3.
    """
    run_coordinator_command(ctx, 'status')


@verdi_coordinator.command()
@click.pass_context
@decorators.requires_loaded_profile()
def configure(ctx):
    """Configure the current profile to use the named pipe broker."""
    run_coordinator_command(ctx, 'configure')
