"""What each command does; `enginehouse/cli.py` says how it is typed and imports a module here when its command runs."""
