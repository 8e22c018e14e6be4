"""The private parts of torch that reading checkpoints uses are there and do what is relied on."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nsa_lightning.checkpoint.compat import SafeReader


class Harm:
    """Unpickling it would call a function."""

    def __reduce__(self):
        return print, ("harm",)


def test_torchs_reader_of_shards_unpickles_the_types_of_a_table_of_contents_alone(tmp_path):
    saved = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    contents = SafeReader(tmp_path).read_metadata()
    assert {name: tuple(entry.size) for name, entry in contents.state_dict_metadata.items()} == {"a": (2, 3), "b": (4,)}
    places = [(info.relative_path, info.offset, info.length) for info in contents.storage_data.values()]
    assert all((tmp_path / file).stat().st_size >= offset + length > 0 for file, offset, length in places)
    assert len(places) == 2
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    dcp.load(loaded, storage_reader=SafeReader(tmp_path), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    spoilt = copy.copy(contents)
    spoilt.planner_data = Harm()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(spoilt))
    with pytest.raises(pickle.UnpicklingError, match=r"holds builtins\.print"):
        SafeReader(tmp_path).read_metadata()
