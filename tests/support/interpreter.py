"""Triton's interpreter without half of its work: a helper that a kernel calls finds the language prepared already."""

import functools


def prepare_the_language_once_a_launch() -> None:
    """Have calls among `@triton.jit` functions skip what the launch has done.

    The interpreter replaces every function of `triton.language` by one that computes with numpy, at each launch and at
    each call of a helper besides, thousands of times in a test.
    """
    from triton.runtime.interpreter import InterpretedFunction, InterpreterError

    prepare_and_call = InterpretedFunction.__call__

    @functools.wraps(prepare_and_call)
    def call(self, *args, **kwargs):
        if not _is_prepared(self.fn):
            return prepare_and_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    if not hasattr(prepare_and_call, "__wrapped__"):
        InterpretedFunction.__call__ = call


def _is_prepared(function) -> bool:
    """Whether the function sees a language that computes with numpy."""
    import triton.language as tl

    seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
    return bool(seen) and not any(tl.core.is_builtin(module.load) for module in seen)
