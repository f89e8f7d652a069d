"""A folder of weights that appears whole or not at all, with bytes that follow from its content."""

import json
import os
import stat
import weakref
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fitlora.checkpoint import TensorInfo
from fitlora.errors import UserError
from fitlora.quantization.writer import (
    ModelWriter,
    Pending,
    bfloat16_config,
    other_files,
    write_safetensors,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("words")
    return folder


def test_files_read_back_as_written(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5, dtype=torch.bfloat16),
        "a": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "long": torch.tensor([1 << 40]),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "strided": torch.randn(4, 6).t(),
    }
    file = tmp_path / "x.safetensors"
    written = write_safetensors(file, tensors)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert written.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert written.checksum == zlib.crc32(file.read_bytes())
    assert set(written.names) == set(tensors)
    with safe_open(file, framework="pt") as content:
        assert content.metadata() == {"format": "pt"}
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_order_of_the_tensors_does_not_matter(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(5, dtype=torch.uint8), "c": torch.ones(2)}
    write_safetensors(tmp_path / "x", tensors)
    write_safetensors(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_pending_tensors_live_one_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def make() -> Tensor:
        nonlocal most
        tensor = torch.ones(100)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    info = TensorInfo(torch.float32, (100,))
    write_safetensors(tmp_path / "x", {f"t{i}": Pending(info, make) for i in range(5)})
    assert len(load_file(tmp_path / "x")) == 5
    assert most <= 2  # the one being written, and the next one being made


def test_pending_tensors_may_come_in_pieces(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.int32).view(3, 4)
    pending = Pending(TensorInfo(torch.int32, (3, 4)), lambda: whole.view(-1).split(5))
    write_safetensors(tmp_path / "x", {"a": pending})
    assert torch.equal(load_file(tmp_path / "x")["a"], whole)
    short = Pending(TensorInfo(torch.int32, (3, 4)), lambda: whole[:2].split(1))
    with pytest.raises(AssertionError, match="a"):
        write_safetensors(tmp_path / "x", {"a": short})


def test_completed_shards_are_used_again(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "new"
    one, two = {"a": torch.ones(3)}, {"b": torch.zeros(2), "c": torch.ones(1)}

    def write(key: str, *, stop: type[BaseException] | None) -> list[str]:
        with ModelWriter(model, target, resume=key) as writer:
            found = [file for file in ("1.safetensors", "2.safetensors") if writer.has(file)]
            if "1.safetensors" not in found:
                writer.write_shard("1.safetensors", one)
            if stop is not None:
                raise stop("stopped")
            if "2.safetensors" not in found:
                writer.write_shard("2.safetensors", two)
            assert writer.finish({}) == 24
        return found

    def stop(key: str, error: type[BaseException]) -> Path | None:
        with pytest.raises(error):
            write(key, stop=error)
        return next(iter(tmp_path.glob(".new.*")), None)

    partial = stop("k", KeyboardInterrupt)
    assert partial is not None
    assert write("k", stop=None) == ["1.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new"]
    files = ["1.safetensors", "2.safetensors", "config.json", "model.safetensors.index.json"]
    assert sorted(p.name for p in target.iterdir()) == [*files, "tokenizer.json"]
    first = {p.name: p.read_bytes() for p in target.iterdir()}
    assert write("other", stop=None) == []
    assert {p.name: p.read_bytes() for p in target.iterdir()} == first

    stop("k", OSError)
    assert write("other", stop=None) == []  # of another source: not used, and removed
    assert not list(tmp_path.glob(".new.*"))
    assert stop("k", UserError) is None  # it would end the same way again

    partial = stop("k", KeyboardInterrupt)
    assert partial is not None
    shard = partial / "1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert write("k", stop=None) == []  # a bit is wrong
    assert {p.name: p.read_bytes() for p in target.iterdir()} == first


def test_modes_are_for_sharing_whatever_the_umask(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").chmod(0o400)
    before = os.umask(0o077)
    try:
        with ModelWriter(model, tmp_path / "deep" / "new") as writer:
            writer.write_shard("model.safetensors", {"a": torch.ones(1)})
            writer.finish({})
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "deep/new").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json"], 0o644)


def test_an_interrupt_leaves_nothing_and_keeps_the_old(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "new"

    def write(value: float, *, interrupt: bool) -> None:
        with ModelWriter(model, target) as writer:
            writer.write_shard("model.safetensors", {"a": torch.full((2,), value)})
            if interrupt:
                raise KeyboardInterrupt
            writer.finish({})

    with pytest.raises(KeyboardInterrupt):
        write(1.0, interrupt=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    write(2.0, interrupt=False)
    with pytest.raises(KeyboardInterrupt):
        write(3.0, interrupt=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new"]
    assert load_file(target / "model.safetensors")["a"].tolist() == [2.0, 2.0]
    write(4.0, interrupt=False)
    assert load_file(target / "model.safetensors")["a"].tolist() == [4.0, 4.0]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, model: Path) -> None:
    stale = tmp_path / ".new.partial"
    stale.mkdir()
    (stale / "junk").write_text("half")
    with ModelWriter(model, tmp_path / "new") as writer:
        writer.write_shard("model.safetensors", {"a": torch.ones(1)})
        writer.finish({})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new"]
    assert not (tmp_path / "new/junk").exists()


def test_no_other_folder_is_replaced(tmp_path: Path, model: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with (
        pytest.raises(UserError, match="home exists and is not a model's folder"),
        ModelWriter(model, home),
    ):
        pass
    for inside in (model, model / "artifacts" / "new"):
        with pytest.raises(UserError, match="lies in"), ModelWriter(model, inside):
            pass
    assert (home / "letter.txt").read_text() == "dear"
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "tokenizer.json"]


def test_weights_pickles_and_hidden_files_are_no_other_files(tmp_path: Path) -> None:
    wanted = [
        "README.md", "additional_chat_templates/tool.jinja", "chat_template.jinja",
        "generation_config.json", "modeling_own.py", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    unwanted = [
        ".gitattributes", ".cache/x.json", "config.json", "consolidated.safetensors",
        "model.safetensors.index.json", "onnx/config.json", "onnx/model.onnx",
        "original/consolidated.00.pth", "original/params.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "tf_model.h5", "training_args.bin", "optimizer.pt",
        "model-q4.gguf", "additional_chat_templates/.hidden",
    ]  # fmt: skip
    for name in (*wanted, *unwanted):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(path) for path in other_files(tmp_path)] == wanted


def test_links_of_a_hub_cache_become_files(tmp_path: Path, model: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("merges")
    (model / "merges.txt").symlink_to(blob)
    with ModelWriter(model, tmp_path / "new") as writer:
        writer.write_shard("model.safetensors", {"a": torch.ones(1)})
        writer.finish({})
    copy = tmp_path / "new/merges.txt"
    assert copy.read_text() == "merges"
    assert not copy.is_symlink()


def test_config_in_bfloat16_keeps_all_else_and_its_order() -> None:
    content = {
        "model_type": "x",
        "torch_dtype": "float16",
        "quantization_config": {"bits": 4},
        "text_config": {"dtype": "float32", "size": 3},
    }
    new = bfloat16_config(content)
    assert json.dumps(new) == (
        '{"model_type": "x", "torch_dtype": "bfloat16", '
        '"text_config": {"dtype": "bfloat16", "size": 3}}'
    )
    assert content["torch_dtype"] == "float16"
    assert bfloat16_config({}) == {"dtype": "bfloat16"}
