"""The command line where only what the package depends on is installed, as `make demo` installs it."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.plain_environment import plain_environment

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_command_line_reads_its_settings_alike_without_the_development_packages():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    result = subprocess.run(
        [*command, str(HERE / "test_settings.py")], capture_output=True, text=True, check=False, env=plain_environment()
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout


def test_the_development_packages_are_hidden():
    code = (
        "from support.plain_environment import hide_development_packages as hide; hide()\n"
        "import importlib.util, importlib.metadata as metadata\n"
        "names = [name for name in ('rich', 'transformers', 'torch') if importlib.util.find_spec(name)]\n"
        "names += [name for name in ('rich', 'lightning') if list(metadata.distributions(name=name))]\n"
        "print(*names)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert printed.stdout.split() == ["torch", "lightning"]
