"""``swl completion``: a script by which a shell completes commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

__all__ = ["add"]

SCRIPT = {
    "bash": """\
_swl() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} path="" known
  for known in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do [[ $known == -* ]] || path="$path $known"; done
  case "$path" in
{cases}
  esac
}}
complete -o default -F _swl swl
""",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n",
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="a script by which a shell completes commands and flags",
        description='Print a script for the shell: put `eval "$(swl completion bash)"` into ~/.bashrc.',
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=sorted(SCRIPT))
    parser.set_defaults(run=lambda options: run(options, commands))


def run(options: argparse.Namespace, commands: Any) -> int:
    """Print the script, made of the parser itself."""
    cases = [
        f'    "{path}"*) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word"));;'
        for path, words in reversed(list(_words("", commands)))  # the longest path first
    ]
    bash = SCRIPT["bash"].format(cases="\n".join(cases))
    print(bash if options.shell == "bash" else SCRIPT["zsh"] + bash, end="")
    return 0


def _words(path: str, commands: Any) -> Iterator[tuple[str, list[str]]]:
    """Go through what may be typed: the words before, and those that may come next."""
    yield path, list(commands.choices)
    for name, parser in commands.choices.items():
        below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        here = f"{path} {name}"
        yield here, [*(below.choices if below else ()), *flags]
        if below:
            for deeper, words in _words(here, below):
                if deeper != here:
                    yield deeper, words
