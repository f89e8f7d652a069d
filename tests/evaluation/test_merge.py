"""The adapter into the weights: what peft's own merge gives, and refusals by name."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fitlora.errors import ArtifactError, UserError
from fitlora.evaluation import merge as module
from fitlora.evaluation.merge import Update, merge_checkpoint, read_adapter
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from tests.tiny_models import dequantized, make_checkpoint, make_config, read_tensors

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj"


def make_adapter(folder: Path, family: str, **settings: Any) -> Path:
    """A stock peft adapter with random A and B."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_config(make_config(family)), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """The original, quantized and adapter folders of a family, made when first wanted."""
    made: dict[tuple[Any, ...], dict[str, Path]] = {}

    def get(
        family: str = "llama",
        *,
        spec: QuantSpec | None = QuantSpec(),  # noqa: B008 (frozen)
        tied: bool = False,
        shards: int = 1,
        **settings: Any,
    ) -> dict[str, Path]:
        key = (family, spec, tied, shards, str(sorted(settings.items())))
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            original = make_checkpoint(root / "original", family, tied=tied, shards=shards)
            quantize_checkpoint(original, root / "quantized", spec=spec, device=CPU)
            made[key] = {
                "original": original,
                "quantized": root / "quantized",
                "adapter": make_adapter(root / "adapter", family, **settings),
            }
        return made[key]

    return get


Folders = Callable[..., dict[str, Path]]


def merge(folders: dict[str, Path], target: Path, **options: Any) -> Path:
    merge_checkpoint(**{"base": "dequantized", "device": CPU} | folders | options, target=target)
    return target


def merged_by_peft(tensors: dict[str, Tensor], folders: dict[str, Path]) -> dict[str, Tensor]:
    """peft's merge of the adapter into a float32 model with `tensors` in it."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folders["original"]), dtype=torch.float32
    )
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    merged = PeftModel.from_pretrained(model, str(folders["adapter"])).merge_and_unload()
    return dict(merged.state_dict())


CASES = [
    ("llama", {"shards": 4}),
    ("llama", {"tied": True, "use_rslora": True}),
    ("llama", {"use_dora": True}),
    ("llama", {"spec": None, "shards": 3}),
    ("qwen2", {"tied": True, "spec": QuantSpec("fp4", 64, double=False), "r": 3}),
    ("phi3", {"shards": 3, "target_modules": ["qkv_proj", "down_proj"]}),
    ("qwen2", {"shards": 2, "bias": "all", "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    ("qwen2", {"tied": True, "bias": "lora_only", "modules_to_save": ["layernorm"]}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_the_merge_is_peft_s(
    family: str, options: dict[str, Any], base: str, folders: Folders, tmp_path: Path
) -> None:
    given = folders(family, **options)
    start = read_tensors(given["original" if base == "original" else "quantized"])
    expected = merged_by_peft({n: t.float() for n, t in dequantized(start).items()}, given)
    # once from the float32 weights, which is what peft merges into here: rounded once, at the end
    found = read_tensors(merge(given, tmp_path / "a", base=base, compute_dtype=torch.float32))
    assert found.keys() == read_tensors(given["original"]).keys()
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)
        changed += not torch.equal(tensor, dequantized(start)[name].bfloat16())
    layers = 2 if family == "phi3" else 7
    if "bias" in options:  # on q, k and v, and two norms
        layers += 5
    ends = 3 if "lm_head" in options.get("modules_to_save", ()) else 0
    assert changed == 2 * layers + ends
    # and from weights in the dtype of training: W is rounded to bfloat16 before the sum
    rounded = {n: t.bfloat16().float() for n, t in dequantized(start).items()}
    expected = merged_by_peft(rounded, given)
    for name, tensor in read_tensors(merge(given, tmp_path / "b", base=base)).items():
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)


def test_rows_in_pieces_give_the_same(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_tensors(merge(folders(), tmp_path / "a"))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 640)  # 10 rows of 64, 5 of 128
    for name, tensor in read_tensors(merge(folders(), tmp_path / "b")).items():
        torch.testing.assert_close(tensor, whole[name], rtol=2**-7, atol=0)


def test_stock_transformers_loads_the_result(folders: Folders, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = folders("llama", shards=4)
    target = merge(given, tmp_path / "m")
    names = {p.name for p in target.iterdir()}
    assert names == {p.name for p in given["original"].iterdir()}
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = read_tensors(target)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    model = AutoModelForCausalLM.from_pretrained(target)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
    assert AutoTokenizer.from_pretrained(target).chat_template


def test_twice_gives_the_same_bytes(folders: Folders, tmp_path: Path) -> None:
    given = folders("qwen2", tied=True)

    def hashes(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    first = hashes(merge(given, tmp_path / "a"))
    assert first == hashes(merge(given, tmp_path / "b"))
    assert first != hashes(merge(given, tmp_path / "c", base="original"))


def test_the_scale(folders: Folders, tmp_path: Path) -> None:
    found = [
        read_adapter(make_adapter(tmp_path / str(on), "llama", r=16, lora_alpha=8, use_rslora=on))
        for on in (False, True)
    ]
    scales = [{u.scale for u in each.values() if isinstance(u, Update)} for each in found]
    assert scales == [{0.5}, {2.0}]
    assert found[0][f"{UP}.weight"].shape == (128, 64)


# --- in 4 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"shards": 4}),
        ("qwen2", {"tied": True, "spec": QuantSpec("fp4", 64, double=False), "r": 3}),
        ("phi3", {"target_modules": ["qkv_proj"]}),  # most layers are not changed
        ("qwen2", {"bias": "all", "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    ],
    ids=str,
)
def test_4_bits_are_those_of_the_16_bit_merge(
    family: str, options: dict[str, Any], base: str, folders: Folders, tmp_path: Path
) -> None:
    given = folders(family, **options)
    found = read_tensors(merge(given, tmp_path / "4", base=base, bits=4))
    whole = merge(given, tmp_path / "16", base=base)
    spec = options.get("spec", QuantSpec())
    quantize_checkpoint(whole, tmp_path / "again", spec=spec, device=CPU)
    expected, before = read_tensors(tmp_path / "again"), read_tensors(given["quantized"])
    assert found.keys() == expected.keys() == before.keys()
    changed = tuple(read_adapter(given["adapter"]))
    for name, tensor in found.items():
        mine = name.startswith(changed)
        assert torch.equal(tensor, expected[name] if mine else before[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_stock_transformers_loads_the_4_bit_result(folders: Folders, tmp_path: Path) -> None:
    target = merge(folders("llama", shards=4), tmp_path / "m", bits=4)
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_tensors(target).keys()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target)
    layer = model.get_submodule(UP)
    assert type(layer).__name__ == "Linear4bit"


def test_4_bits_need_a_4_bit_base(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no 4-bit weights; set merge\.bits: 16"):
        merge(folders(spec=None), tmp_path / "m", bits=4)
    assert not (tmp_path / "m").exists()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        (
            {"modules_to_save": ["mlp"]},
            r"mlp\..*_proj\.weight is no part of a linear layer",
        ),
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_refused_by_name(
    settings: dict[str, Any], named: str, folders: Folders, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", "llama", **settings)
    with pytest.raises(UserError, match=named):
        merge({**folders(), "adapter": adapter}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def _setting(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def _tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return change


def _text(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / file).write_text(text))


def void(_: object) -> None:
    return None


A, B = (f"base_model.model.{UP}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_setting("use_a_later_variant", True), UserError, "use_a_later_variant is True"),
        (_setting("init_lora_weights", "pissa"), UserError, "init_lora_weights is 'pissa'"),
        (_setting("peft_type", "IA3"), UserError, "is no LoRA adapter's"),
        (_setting("r", 8), UserError, "_proj is not of rank 8"),
        (_setting("r", None), ArtifactError, "damaged: r is None"),
        (_setting("modules_to_save", "lm_head"), ArtifactError, "modules_to_save is 'lm_head'"),
        (_text("adapter_config.json", "{"), ArtifactError, "adapter_config.json is damaged"),
        (_text("adapter_model.safetensors", "x"), ArtifactError, "model.safetensors cannot be r"),
        (
            lambda folder: void((folder / "adapter_model.safetensors").unlink()),
            ArtifactError,
            r"adapter_model\.safetensors is missing",
        ),
        (
            lambda folder: void((folder / "adapter_config.json").unlink()),
            ArtifactError,
            r"adapter_config\.json is missing",
        ),
        (_tensors(lambda t: t.pop(A)), UserError, f"has lora_B of {UP} and no lora_A"),
        (_tensors(lambda t: t.pop(B)), UserError, f"has lora_A of {UP} and no lora_B"),
        (_tensors(lambda t: t.clear()), UserError, "is empty"),
        (_tensors(lambda t: t[A].fill_(float("nan"))), UserError, f"{A} has values that are not"),
        (
            _tensors(lambda t: t.update({B: torch.zeros(127, 4)})),
            UserError,
            rf"the update of {UP}.weight is \(127, 64\), the weight \(128, 64\)",
        ),
        (
            _tensors(lambda t: t.update({A.replace("layers.0", "layers.7"): t[A].clone(),
                                         B.replace("layers.0", "layers.7"): t[B].clone()})),
            UserError,
            r"an update of model\.layers\.7\.mlp\.up_proj\.weight, which .* does not have",
        ),
        (
            _tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
            UserError,
            r"base_model\.model\.lm_head\.weight is no part of a linear layer's LoRA",
        ),
        (
            _tensors(lambda t: t.update({f"{A}.odd": torch.ones(2, 2)})),
            UserError,
            rf"{A}\.odd is no part",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused_by_name(
    spoil: Callable[[Path], None],
    error: type[Exception],
    message: str,
    folders: Folders,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders()["adapter"], adapter)
    spoil(adapter)
    with pytest.raises(error, match=message):
        merge({**folders(), "adapter": adapter}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_sum_that_overflows_is_named_and_leaves_nothing(folders: Folders, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders()["adapter"], adapter)
    _tensors(lambda tensors: (tensors[A].fill_(1e30), tensors[B].fill_(1e30)))(adapter)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=rf"{UP}\.weight has values that are not finite"):
        merge({**folders(), "adapter": adapter}, tmp_path / "out" / "m")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tied_table_is_not_replaced(folders: Folders, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "llama", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight, .* would change both"):
        merge({**folders(tied=True), "adapter": adapter}, tmp_path / "m")


def test_a_tied_head_is_not_merged_into(folders: Folders, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", "llama", target_modules=["lm_head"])
    given = {**folders(tied=True), "adapter": adapter}
    with pytest.raises(UserError, match=r"an update of lm_head\.weight"):
        merge(given, tmp_path / "m")
    # untied, it is a layer like any other
    target = merge({**folders(), "adapter": adapter}, tmp_path / "m")
    assert not torch.equal(
        read_tensors(target)["lm_head.weight"],
        read_tensors(folders()["original"])["lm_head.weight"],
    )


def test_an_original_that_is_quantized_has_no_16_bit_weights(
    folders: Folders, tmp_path: Path
) -> None:
    given = {**folders(), "original": folders()["quantized"]}
    with pytest.raises(UserError, match=r"set merge\.base: dequantized"):
        merge(given, tmp_path / "m", base="original")
    assert not (tmp_path / "m").exists()
