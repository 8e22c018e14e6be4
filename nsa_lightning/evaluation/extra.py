"""Libraries of the extra `eval`, which only some tasks need."""

from importlib.util import find_spec

from nsa_kernels.errors import SettingError


def require(package: str, task: str) -> None:
    """Refuse a task whose library is not installed.

    Raises:
        ValueError: says how to install it.
    """
    if find_spec(package) is None:
        raise SettingError(f"tasks: {task} needs the package {package}: pip install 'nsa-lightning[eval]'")
