import os
from importlib.util import find_spec

from support.interpreter import prepare_the_language_once_a_launch

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    prepare_the_language_once_a_launch()
