"""Pickles are read, never run: what they hold comes out, what they ask for beyond that does not."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbm_fast.adapters._unpickle import Record, read_pickle

TOUCHED = "touched-by-a-pickle"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def persistence(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], Call]:
    """Objects as torch_utils.persistence pickles them."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> None: ...

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def made(name: str, state: dict[str, Any]) -> Call:
        source = f"import os; os.mkdir({TOUCHED!r})"
        meta = dict(type="class", version=6, module_src=source, class_name=name, state=state)
        return Call(_reconstruct_persistent_obj, meta)

    return made


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_a_snapshot_holds(
    tmp_path: Path, protocol: int, persistence: Callable[[str, dict[str, Any]], Call]
) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "_parameters": collections.OrderedDict(
            weight=torch.nn.Parameter(weight), row=torch.nn.Parameter(weight[1:, 2]), bias=None
        ),
        "_modules": {"enc": torch.nn.ModuleDict()},
        "numbers": (1, -3, 2**40, 2**100, 1.5, float("inf"), None, True, False, "π" * 300),
        "skip_scale": np.sqrt(0.5),
        "names": {"a", "b"},
        "list": [[], [1], [1, 2]],
        "bytes": b"x" * 300,
        "dtype": torch.float16,
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "long": torch.tensor([[3]]),
        "array": np.arange(3.0),
    }
    path = write(tmp_path / "a.pkl", pickle.dumps({"ema": persistence("Net", state)}, protocol))
    record = read_pickle(path)["ema"]
    assert isinstance(record, Record) and record.class_name == "Net"
    read = record.state
    assert read.keys() == state.keys()
    assert torch.equal(read["_parameters"]["weight"], weight)
    assert torch.equal(read["_parameters"]["row"], weight[1:, 2])
    assert read["_parameters"]["bias"] is None
    assert read["_modules"]["enc"].class_name == "ModuleDict"
    assert read["_modules"]["enc"].state["_modules"] == {}
    for name in ("numbers", "names", "list", "bytes", "dtype"):
        assert read[name] == state[name], name
    assert type(read["skip_scale"]) is float and read["skip_scale"] == state["skip_scale"]
    assert torch.equal(read["half"], torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert read["long"].dtype == torch.int64 and read["long"].tolist() == [[3]]
    assert read["array"].class_name == "ndarray"


def test_one_object_stays_one(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    path = write(tmp_path / "a.pkl", pickle.dumps([tensor, tensor, tensor[1:]]))
    a, b, _ = read_pickle(path)
    a += 1
    assert a is b


HOSTILE: dict[str, tuple[Any, str]] = {
    "system": (Call(os.system, f"mkdir {TOUCHED}"), "posix.system"),
    "eval": (Call(eval, f"__import__('os').mkdir('{TOUCHED}')"), "builtins.eval"),
    "import": (Call(__import__, "antigravity"), "builtins.__import__"),
    "getattr": (Call(getattr, "", "__class__"), "builtins.getattr"),
    "subprocess": (Call(subprocess.run, ["mkdir", TOUCHED]), "subprocess.run"),
    "partial": (functools.partial(os.mkdir, TOUCHED), "functools.partial"),
    "torch.load": (Call(torch.load, "file"), "torch.serialization.load"),
    "torch module": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "of torch.hub": (Call(torch.hub.load, "a", "b"), "torch.hub.load"),
    "numpy": (Call(np.load, "file"), "numpy"),
    "open": (Call(open, TOUCHED, "w"), "open"),
    "bytearray": (bytearray(3), "builtins.bytearray"),
    "complex": (1j, "builtins.complex"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("nested", [False, True])
def test_hostile_files_are_named_and_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    persistence: Callable[[str, dict[str, Any]], Call],
    case: str,
    nested: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile, name = HOSTILE[case]
    value = {"ema": persistence("EDMPrecond", {"x": [({"y": hostile},)]})} if nested else hostile
    path = write(tmp_path / "evil.pkl", pickle.dumps(value))
    with pytest.raises(ValueError, match=r"evil\.pkl.*" + name):
        read_pickle(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.pkl"]


def test_hostile_memory_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = io.BytesIO()
    torch.save(Call(os.mkdir, TOUCHED), inner, _use_new_zipfile_serialization=False)
    load = torch.storage._load_from_bytes  # type: ignore[attr-defined]
    for data in (inner.getvalue(), pickle.dumps(Call(os.mkdir, TOUCHED)), b"", b"PK\x03\x04"):
        path = write(tmp_path / "evil.pkl", pickle.dumps(Call(load, data)))
        with pytest.raises(ValueError, match=r"evil\.pkl"):
            read_pickle(path)
    assert not (tmp_path / TOUCHED).exists()


def storage(numbers: int) -> Any:
    return torch.arange(float(numbers))._typed_storage()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "arguments",
    [
        (storage(4), 0, (5,), (1,)),
        (storage(4), 1, (4,), (1,)),
        (storage(4), -1, (2,), (1,)),
        (storage(4), 0, (1 << 50,), (0,)),
        (storage(4), 0, (2, 2), (3, 1)),
        (storage(4), 0, ("a",), (1,)),
        ("storage", 0, (1,), (1,)),
    ],
)
def test_tensors_stay_inside_their_memory(tmp_path: Path, arguments: Any) -> None:
    rebuild = torch._utils._rebuild_tensor_v2
    value = Call(rebuild, *arguments, False, collections.OrderedDict())
    path = write(tmp_path / "a.pkl", pickle.dumps(value))
    with pytest.raises(ValueError, match=r"a\.pkl"):
        read_pickle(path)


def test_attributes_are_set_on_nothing_of_ours(tmp_path: Path) -> None:
    for target in (b"ccollections\nOrderedDict\n", b"ctorch.storage\n_load_from_bytes\n"):
        evil = b"\x80\x04" + target + b"N}\x8c\x07__doc__\x8c\x04evils\x86b."
        with pytest.raises(ValueError, match="attributes of a _Name"):
            read_pickle(write(tmp_path / "a.pkl", evil))
    assert "evil" not in (collections.OrderedDict.__doc__ or "")


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"no pickle at all",
        b"\x80\x04.",  # an empty stack
        b"\x80\x04K\x01",  # no end
        b"\x80\x04h\x07.",  # nothing was memoised
        b"\x80\x04e.",  # no mark
        b"\x80\x04](K\x01u.",  # items of a list
        b"\x80\x04}(K\x01u.",  # a key without its value
        b"\x80\x04}]K\x01s.",  # a list as a key
        b"\x80\x04K\x01K\x02R.",  # a call of a number
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.",  # bytes that are not there
        b"\x80\x04\x8b\xff\xff\xff\x7fabc.",  # an integer that is not there
        b"\x80\x04Pperson\n.",  # a persistent id
        b"\x80\x04\x82\x01.",  # the extension registry
        b"cos\nsystem\n(S'mkdir x'\ntR.",
    ],
)
def test_broken_programs(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot load .*a\.pkl"):
        read_pickle(write(tmp_path / "a.pkl", program))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    data = pickle.dumps({"a": [1, (2.0, "x")], "w": torch.zeros(2), "s": {1}})
    for end in range(0, len(data), 7):
        with pytest.raises(ValueError, match=r"a\.pkl"):
            read_pickle(write(tmp_path / "a.pkl", data[:end]))


def test_bombs_end_soon(tmp_path: Path) -> None:
    doubled = b"\x80\x04)" + b"2\x86" * 200 + b"."  # 2^200 elements, if they were ever copied
    assert isinstance(read_pickle(write(tmp_path / "a.pkl", b"\x80\x04)" + b".")), tuple)
    for program in (doubled[:-1] + b")R.", doubled[:-1] + b"}\x94h\x00s."):
        with pytest.raises(ValueError, match=r"a\.pkl"):
            read_pickle(write(tmp_path / "a.pkl", program))
    deep = b"\x80\x04)" + b"\x85" * 1_000_00 + b"."
    key = deep[:-1].replace(b"\x80\x04)", b"\x80\x04})", 1) + b"K\x01s."
    with pytest.raises(ValueError, match="a tuple as a key"):
        read_pickle(write(tmp_path / "a.pkl", key))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pkl.*does not exist"):
        read_pickle(tmp_path / "nothing.pkl")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_pickle(tmp_path)
