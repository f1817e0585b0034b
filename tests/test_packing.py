"""Packed states: whatever went in comes out, bit by bit; what is no packed state is refused by name."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as serialize

from prefenv.checkpoints import save_checkpoint
from prefenv.errors import CheckpointError
from prefenv.packing import pack, unpack
from prefenv.testing.probe import probe_env


def there_and_back(tree, folder):
    path = folder / "state"
    path.write_bytes(pack(tree))
    return unpack(path)


def same(one, other):
    """Equal trees, where a tuple is a list, NaN is NaN and tensors are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.detach().numpy(force=True).tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


tensors = st.builds(
    lambda shape, dtype, seed: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    ).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(
        [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
    ),
    st.integers(0, 9),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.sampled_from(["__tensor__", "__dict__", "0"])
trees = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(tree=trees)
def test_every_tree_comes_back(tree, tmp_path_factory):
    assert same(tree, there_and_back(tree, tmp_path_factory.mktemp("t")))


def test_keys_keep_their_type_and_their_order(tmp_path):
    tree = {3: "a", "3": "b", 1: {"x": (1, 2.5, None)}, "__tensor__": "no tensor"}
    got = there_and_back(tree, tmp_path)
    assert list(got) == [3, "3", 1, "__tensor__"] and got[1]["x"] == [1, 2.5, None]


def test_views_shared_and_trained_tensors_come_back_alone(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tree = {"t": base.T, "row": base[1], "again": base[1], "p": torch.nn.Parameter(base[:, 1])}
    got = there_and_back(tree, tmp_path)
    assert all(same(tree[k].contiguous(), got[k]) for k in tree)
    got["row"].zero_()
    assert bool(got["again"].any()) and not got["p"].requires_grad
    half = there_and_back([torch.randn(3).bfloat16()], tmp_path)[0]
    assert half.dtype == torch.bfloat16


def test_packing_takes_a_copy():
    x = torch.zeros(3)
    data = pack([x])
    x += 1
    assert data != pack([x]) and pack([torch.zeros(3)])[-12:] == data[-12:]


def test_an_optimizers_state_goes_on_exactly(tmp_path):
    def model():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.Adam(net.parameters(), lr=0.1, fused=True)

    def steps(net, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    whole, half, resumed = model(), model(), model()
    steps(*whole, range(4))
    steps(*half, range(2))
    state = there_and_back([half[0].state_dict(), half[1].state_dict()], tmp_path)
    for part, value in zip(resumed, state, strict=True):
        part.load_state_dict(value)
    steps(*resumed, range(2, 4))
    assert all(map(torch.equal, whole[0].parameters(), resumed[0].parameters()))


def test_a_generators_state_goes_on_exactly(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    other = torch.Generator()
    other.set_state(there_and_back(generator.get_state(), tmp_path))
    assert torch.equal(torch.randn(9, generator=generator), torch.randn(9, generator=other))


def test_it_is_safetensors_that_anybody_can_read(tmp_path):
    (tmp_path / "s").write_bytes(pack({"w": torch.ones(2), "n": 3}))
    with safe_open(tmp_path / "s", "pt") as file:
        assert [file.get_tensor(k).tolist() for k in file.keys()] == [[1, 1]]  # noqa: SIM118
        assert json.loads(file.metadata()["tree"])


def test_what_is_no_json_is_refused_before_anything_is_written():
    for leaf in (object(), {1, 2}, b"bytes", 1j):
        with pytest.raises(TypeError, match="JSON"):
            pack({"a": [leaf]})


def test_broken_files_are_refused_by_name(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        unpack(path)
    data = pack({"w": torch.randn(50), "n": [1, 2, 3]})
    for cut in [*range(16), *range(16, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            unpack(path)
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError):
        unpack(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "state"
    ran = []

    class Evil:
        def __reduce__(self):
            return ran.append, (1,)

    for data in (pickle.dumps(Evil()), b"PK\x03\x04", b"{}", b"\x00" * 64):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            unpack(path)
    assert not ran
    env, _ = probe_env()
    save_checkpoint(path, env.reference.flow, env.task, {})
    with pytest.raises(CheckpointError, match="prefenv-state-1.*prefenv-flow-1"):
        unpack(path)


@pytest.mark.parametrize(
    "tree",
    [
        *(None, "{", '{"a": 1}', '{"__tensor__": "7"}', '{"__dict__": [1]}'),
        *('{"__dict__": [[[1], 2]]}', '{"__dict__": 3}'),
    ],
)
def test_a_tree_that_cannot_be_read_is_refused(tmp_path, tree):
    header = {"format": "prefenv-state-1"} | ({} if tree is None else {"tree": tree})
    (tmp_path / "s").write_bytes(serialize({"0": torch.zeros(1)}, header))
    with pytest.raises(CheckpointError, match="its tree cannot be read"):
        unpack(tmp_path / "s")
