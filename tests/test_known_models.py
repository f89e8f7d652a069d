"""Models that are known by name: their sizes, and what a name is taken for."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import model_sizes
from fitlora.errors import UserError
from fitlora.known_models import SHAPES, config_of, config_to_plan
from fitlora.model import empty_model

# Parameters as their makers count them; of a tied table once, of Gemma 3 without its eyes.
PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-2-13b": 13_015_864_320,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "olmo-2-1b": 1_484_916_736,
}


def test_every_model_has_its_size() -> None:
    found = {
        name: sum(
            parameter.numel()
            for parameter in empty_model(config_of(shape), dtype=torch.bfloat16).parameters()
        )
        for name, shape in SHAPES.items()
    }
    assert found == PARAMETERS


def test_a_name_is_taken_as_it_is_spelled_elsewhere() -> None:
    config = config_to_plan("Qwen3-32B", None)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen3", 5120, 64)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-3-8b").mkdir()
    Path("llama-3-8b/config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2})
    )
    assert config_to_plan("llama-3-8b", None).hidden_size == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama-3-80b", "did you mean llama-3-8b or llama-3-70b or "),
        ("gpt", "known are tinyllama-1.1b, llama-3.2-1b, "),
        ("someone/llama-3-8b", "needs model.revision"),
        ("./llama-3-8b", "is neither a folder nor a hub id"),
    ],
)
def test_what_is_none_of_them_is_told(name: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        config_to_plan(name, None)
    assert said in str(refusal.value)


def test_the_page_of_what_models_take_has_what_was_estimated() -> None:
    found = json.loads(model_sizes.RESULT.read_text())["rows"]
    assert {row["model"]: row["parameters"] for row in found} == PARAMETERS
    assert model_sizes.PAGE.read_text() == model_sizes.page(found), (
        "python -m benchmarks.model_sizes"
    )
