"""The command line: one file for each command, which `python -m dengine NAME` imports when it is called.

A command's module has `configure(parser)`, which declares its arguments, and `run(options) -> int`, which gives the
exit code: 0 if all is well, 1 if what it examined is not, 2 for wrong arguments.
"""
