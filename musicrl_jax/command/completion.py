"""Completes verbs, flags and gin files in a shell, by argcomplete.

One line in ~/.bashrc or ~/.zshrc switches it on:

    eval "$(register-python-argcomplete musicrl)"
"""

import argparse
from collections.abc import Sequence
from typing import Any

import argcomplete

from musicrl_jax.command import signatures
from musicrl_jax.command.names import VERBS

SHARED = ("--gin_file", "--gin_search_paths", "--dry_run", "--wandb", "--help")


def complete(gin_files: Sequence[str], **how: Any) -> None:
    """Writes the completions that the shell asked for, and exits.

    Args:
      gin_files: names of the gin files that ship.
      how: what `argcomplete.autocomplete` takes besides.
    """
    argcomplete.autocomplete(parser(gin_files), always_complete_options=False, **how)


def parser(gin_files: Sequence[str]) -> argparse.ArgumentParser:
    """Returns a parser of all verbs and their flags, for completion alone."""
    # argcomplete reads argparse's parsers. The command's own parser knows no flags of verbs.
    parser = argparse.ArgumentParser("musicrl", add_help=False)
    verbs = parser.add_subparsers()
    files = argcomplete.completers.FilesCompleter(["gin"])

    def complete_gin_file(prefix: str, **_: Any) -> list[str]:
        return [*(name for name in gin_files if name.startswith(prefix)), *files(prefix)]

    # Flags come from source, so that a key press does not wait for jax.
    for name, verb in VERBS.items():
        flags = verbs.add_parser(name, help=verb.purpose, add_help=False)
        for flag in SHARED:
            flags.add_argument(flag).completer = complete_gin_file if flag == "--gin_file" else None
        for parameter in signatures.read(verb.place).parameters:
            flags.add_argument(f"--{parameter.name}", help=parameter.doc.replace("%", "%%"))
    return parser
