"""The command line, a file for each group of commands; `main` is its entry point."""

from flexmoe.cli.commands import app as app
from flexmoe.cli.commands import main as main
