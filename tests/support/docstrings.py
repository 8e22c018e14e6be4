"""Docstrings of a class's attributes, read from its source once a process instead of once a parser."""

import functools

from docstring_parser.attrdoc import AttributeDocstrings


def remember_attribute_docstrings() -> None:
    """Parsers of `nsa fit` are built by the hundred here; half of their time is the tokenizing of the same sources."""
    if not hasattr(AttributeDocstrings.get_attr_docs, "__wrapped__"):
        AttributeDocstrings.get_attr_docs = _remembered(AttributeDocstrings.get_attr_docs)


def _remembered(get_attr_docs):
    known = {}

    @functools.wraps(get_attr_docs)
    def call(self, component):
        if component not in known:
            known[component] = get_attr_docs(self, component)
        return known[component]

    return call
