"""Imports between files; those between packages are contracts in `pyproject.toml`. `make check` runs this too."""

from graphlib import CycleError, TopologicalSorter

import grimp


def circle(imports):
    """A circle of files that import each other, or none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_imports_itself_by_way_of_others_not_even_for_its_types():
    graph = grimp.build_graph("nsa_cli", "nsa_lightning", "nsa_kernels", cache_dir=None)
    imports = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    assert circle(imports) is None
    assert len(imports) > 100
    upwards = ("nsa_lightning.model.rope", "nsa_lightning.model.transformer")
    imports[upwards[0]].add(upwards[1])
    assert set(upwards) <= set(circle(imports))  # it would have been found
