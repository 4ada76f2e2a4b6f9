"""Commands: one module for each command of ``rankload``, and what they share.

To add the command ``rankload find``:

1. Write ``launch/commands/find.py`` with a function ``find``. Its docstring is the help text. Its arguments are typer's
   (``Annotated[str, typer.Argument(...)]``). A first argument ``call: Call`` brings `calls.SHARED`, the options that
   commands share (``--json``, ``--storage-option`` and so on), without a word of them; the function then finds the
   load's options in ``call.options``. It says its result by ``call.show`` once, and returns an exit code of `endings`
   (None is 0). Errors of `rankload.loader.errors` are raised, never caught to be printed.
2. Add its name to ``COMMANDS`` in ``launch/cli.py``.

A command of several (``rankload cache list``) has, in place of the function, a dict of functions by name; the module's
docstring is then the help text.

What a command does is in ``rankload.loader``, which imports no ``launch``; a module here reads arguments, calls it, and
prints. Nothing here imports torch or fsspec at its top, so that ``--help`` and what reads indexes alone start at once.

`calls` has `Call` and the shared options, `blocks` what is printed (for a terminal, for a pipe), `endings` exit codes
and what is said of an error. All but `endings` and `blocks` need typer.
"""
