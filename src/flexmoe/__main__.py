"""``python -m flexmoe``: the command line, for launchers that want a module."""

from flexmoe.cli import main

main()
