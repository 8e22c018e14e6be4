"""The `nsa` command: looks at the first word and imports what that command needs, no more."""

import signal
import sys
from importlib import import_module

_TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "score each piece of a validation document with a checkpoint",
}

_OTHER_COMMANDS = {
    "prepare": "tokenise texts of any size into a set to train on",
    "consolidate": "write a sharded checkpoint as one file",
    "memory": "tell what a step of fit takes on each GPU, before anything is allocated",
    "convert": "make an NSA model of a dense Hugging Face one, to train on",
    "generate": "continue prompts with a trained model, or answer them",
    "evaluate": "measure what a model can do, beside sparse attention methods",
    "export": "write a checkpoint as a Hugging Face directory",
    "bench": "measure kernels, decoding, the loader or training, or compare runs of fit: nsa bench --help",
}

_HELP = """usage: nsa COMMAND [options]

Train long-context language models with Native Sparse Attention.

commands:
{commands}

  nsa COMMAND --help           every setting of a command
  nsa COMMAND --print_config   the settings of fit, validate, test or predict as YAML, to start a config from
  nsa --version                the installed version

example:
  nsa fit --config configs/quickstart.yaml --data.sources '[my_texts/]'
"""


def main() -> int:
    """Run the command of `sys.argv`; returns the exit status."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        commands = _TRAINER_COMMANDS | _OTHER_COMMANDS
        print(_HELP.format(commands="\n".join(f"  {name:<12}{text}" for name, text in commands.items())))
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"nsa-lightning {version('nsa-lightning')}")
        return 0
    if command in _TRAINER_COMMANDS | _OTHER_COMMANDS:
        module = "trainer_commands" if command in _TRAINER_COMMANDS else command
        try:
            return int(import_module(f"nsa_cli.{module}").run())
        except KeyboardInterrupt:  # such as during the imports, which take seconds
            print(f"nsa {command}: error: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
    from nsa_cli.parser import suggestion

    commands = _TRAINER_COMMANDS | _OTHER_COMMANDS
    known = f"the commands are {', '.join(commands)}{suggestion(command, commands)}"
    print(f"nsa: error: no command {command!r}; {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
