"""Trained biases and saved modules: against stock peft, through the step, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fitlora.adapter import adapter_config, load_adapter, save_adapter
from fitlora.artifacts import SequenceSize
from fitlora.errors import UserError
from fitlora.memory.estimate import Load, trace_step
from fitlora.memory.trace import rounded
from fitlora.model import load_config
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.planner.chain import Freedom
from fitlora.planner.model import model_size
from fitlora.step.build import build_step, lora_targets, step_skeleton
from fitlora.step.network import AutogradNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights, RandomWeights
from fitlora.step.whole import whole_parameters
from fitlora.training.start import check_start, read_start
from tests.step import steps
from tests.tiny_models import VOCABULARY, make_checkpoint, make_config

ENDS = ("embed_tokens", "lm_head", "norm")
CASES: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all", "target_modules": ("v_proj", "down_proj")},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ("v_proj", "down_proj")},
    "modules": {"modules_to_save": ENDS},
    "biases of norms and head": {"bias": "all"},
    "both, with DoRA": {"bias": "lora_only", "modules_to_save": ("lm_head",), "dora": True},
}


def lora(**options: Any) -> LoraParams:
    return LoraParams(**{"r": 4, "alpha": 12.0, "dropout": 0.0, **options})


def settings(of: LoraParams, bits: int = 4, **train: Any) -> StepSettings:
    quantization = QuantizationParams.model_validate({"bits": bits})
    return StepSettings(quantization, of, TrainParams(max_gradient_norm=None, **train))


def config() -> Any:
    """A small model with biases on q, k and v, and a head of its own."""
    return make_config("qwen2")


def make(of: LoraParams, *, bits: int = 4, **plan: Any) -> TrainingStep:
    weights = RandomWeights(torch.device("cpu"))
    return build_step(config(), steps.plan(**plan), settings(of, bits), weights)


def run(made: TrainingStep, count: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and what was learned."""
    losses = [
        float(made.run(steps.sequences(7, seed), step=seed, learning_rate=1e-2).loss)
        for seed in range(count)
    ]
    return losses, made.adapter_state()


def assert_same(found: TrainingStep, expected: TrainingStep) -> None:
    """To the bit, over some steps."""
    (losses, state), (expected_losses, expected_state) = run(found), run(expected)
    assert losses == expected_losses
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())


EVERYTHING = lora(bias="all", modules_to_save=ENDS, dropout=0.1)


# --- stock peft ----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(case: str, tmp_path: Path) -> Path:
    phi = {"model_type": "phi", "num_key_value_heads": 4}  # has biases everywhere
    changes = phi if case == "biases of norms and head" else {}
    folder = tmp_path / "model"
    return make_checkpoint(folder, "qwen2", dtype=torch.float32, tokenizer=False, **changes)


def on_checkpoint(folder: Path, of: LoraParams, **given: Any) -> TrainingStep:
    weights = CheckpointWeights(folder, torch.device("cpu"), **given)
    return build_step(load_config(folder), steps.plan(), settings(of, bits=16), weights)


def peft_loss(model: Any, rows: list[Any]) -> Tensor:
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        wanted = torch.tensor(list(row.learned[1:]), dtype=torch.bool)
        targets = torch.tensor(row.tokens[1:])[wanted]
        losses.append(nn.functional.cross_entropy(logits[wanted], targets, reduction="sum"))
    return torch.stack(losses).sum() / sum(row.target_tokens for row in rows)


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_has_the_same_outputs_and_gradients(
    case: str, checkpoint: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = lora(**CASES[case])
    step = on_checkpoint(checkpoint, options)
    start = step.adapter_state()
    rows = steps.sequences(7)
    for index in range(3):
        step.run(rows, step=index, learning_rate=1e-2)
    described = adapter_config(options, lora_targets(step.model), base_model="a", revision=None)
    folder = tmp_path / "adapter"
    save_adapter(folder, step.adapter_state(), described)
    whole = whole_parameters(step.model)
    assert all(not torch.equal(p, start[n]) for n, p in whole.items()), "all of them learned"

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    loss = peft_loss(theirs, rows)
    loss.backward()
    gradients: dict[str, Tensor] = {}

    def look(found: float, norm: float) -> bool:
        gradients.update({n: p.grad.clone() for n, p in step.adapters.items()})  # type: ignore[union-attr]
        assert found == pytest.approx(loss.item(), rel=1e-5)
        return False

    step.run(rows, step=3, learning_rate=0.0, accept=look)
    trained = {
        name.replace("modules_to_save.default.", ""): parameter.grad
        for name, parameter in theirs.base_model.model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == gradients.keys(), "peft trains the same"
    for name, gradient in gradients.items():
        expected = trained[name]
        assert float(expected.norm()) > 0
        assert float((gradient - expected).norm() / expected.norm()) < 1e-3, name


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_from_what_stock_peft_saved(case: str, checkpoint: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = lora(**CASES[case])
    step = on_checkpoint(checkpoint, options)
    theirs: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        LoraConfig(
            r=4, lora_alpha=12, target_modules=lora_targets(step.model), use_dora=options.dora,
            bias=options.bias, modules_to_save=list(options.modules_to_save) or None,
        ),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    folder = tmp_path / "adapter"
    theirs.save_pretrained(folder)
    state = read_start(folder, options)
    check_start(folder, state, step.adapters)
    rows = steps.sequences(7)
    loss, count = on_checkpoint(checkpoint, options, adapter=state).evaluate(rows)
    assert float(loss) / count == pytest.approx(peft_loss(theirs, rows).item(), rel=1e-5)
    with pytest.raises(UserError, match=r"its (bias|modules_to_save) is .* set lora\."):
        read_start(folder, lora(dora=options.dora))


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_as_the_frozen_model_to_the_bit(dtype: str) -> None:
    """And is float32 itself; what it computes with follows."""
    made, plain = (make(of, compute_dtype=dtype) for of in (EVERYTHING, lora()))
    plain.network = AutogradNetwork(plain.model, plain.context, plain.plan, plain.network.placement)
    rows = steps.sequences(7)
    assert torch.equal(made.evaluate(rows)[0], plain.evaluate(rows)[0])
    whole = whole_parameters(made.model)
    assert {p.dtype for p in whole.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in whole.items()}
    made.run(rows, step=0, learning_rate=1e-4)  # less than half of bf16's step at 1
    assert all(not torch.equal(p, before[n]) for n, p in whole.items())


def test_the_general_step_takes_it_and_says_why() -> None:
    def reason(of: LoraParams, model: Any) -> str:
        skeleton = step_skeleton(model, steps.plan(), settings(of))
        assert bool(skeleton.layers) == skeleton.reason.endswith(" by hand")
        return skeleton.reason

    assert reason(lora(bias="all"), config()).startswith("model.layers.0.self_attn.q_proj.")
    assert "model.embed_tokens.weight is trained" in reason(EVERYTHING, config())
    # a model without biases has nothing to train there
    assert reason(lora(bias="all"), steps.config()) == "llama by hand"


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ({"optimizer_device": "host"}, EVERYTHING),
        ({"recompute_layers": (0, 1)}, EVERYTHING),
        ({"recompute_layers": (0, 1), "streamed_layers": (0, 1)}, EVERYTHING),
        ({"recompute_layers": (1,), "streamed_layers": (1,)}, lora(bias="lora_only")),
        ({"recompute_layers": (0, 1), "embedding": "host"}, lora(modules_to_save=("lm_head",))),
    ],
    ids=str,
)
def test_where_the_parts_lie_changes_nothing(plan: dict[str, Any], options: LoraParams) -> None:
    assert_same(make(options, **plan), make(options))


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"loss_chunk_tokens": 5}])
def test_gradients_do_not_depend_on_the_plan(changes: dict[str, Any]) -> None:
    batch = steps.sequences(7)
    whole = steps.gradients(make(EVERYTHING), batch)
    assert steps.distance(steps.gradients(make(EVERYTHING, **changes), batch), whole) < 1e-4


def test_gradients_of_devices_add_up_to_those_of_one() -> None:
    """A rank of three has no sequence of its own, and takes part with tensors of the same shapes."""
    batch = steps.sequences(2)
    whole = steps.gradients(make(EVERYTHING), batch)
    plan = {"devices": 3, "effective_batch_size": 2, "micro_batch_size": 1}
    summed: list[list[Tensor]] = []
    for rank in range(3):
        reduced: list[Tensor] = []
        make(EVERYTHING, **plan).run(
            batch[rank : rank + 1],
            step=3,
            learning_rate=0.0,
            total_target_tokens=sum(s.target_tokens for s in batch),
            reduce_gradients=lambda tensors, to=reduced: to.extend(t.clone() for t in tensors),
        )
        summed.append(reduced[:-1])
    sums = [torch.stack(parts).sum(0) for parts in zip(*summed, strict=True)]
    norm = torch.cat([gradient.flatten() for gradient in whole.values()]).norm()
    assert len(sums) == len(whole)
    torch.testing.assert_close(torch.cat([s.flatten() for s in sums]).norm(), norm)


def test_gradients_are_clipped_with_the_others() -> None:
    given = StepSettings(QuantizationParams(), EVERYTHING, TrainParams(max_gradient_norm=1e-3))
    made = build_step(config(), steps.plan(), given, RandomWeights(torch.device("cpu")))
    seen: dict[str, Tensor] = {}
    assert made.optimizer is not None
    made.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in made.adapters.items()})  # type: ignore[union-attr]
    )
    made.run(steps.sequences(7), step=0, learning_rate=0.0)
    assert whole_parameters(made.model).keys() < seen.keys()
    norm = torch.cat([gradient.flatten() for gradient in seen.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    given = settings(EVERYTHING, weight_decay=0.5)
    made = build_step(config(), steps.plan(), given, RandomWeights(torch.device("cpu")))
    assert made.optimizer is not None
    decays = {
        id(p): group["weight_decay"]
        for group in made.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in made.adapters.items():
        assert decays[id(parameter)] == (0.0 if name.endswith(("bias", "norm.weight")) else 0.5)


@pytest.mark.parametrize("optimizer", ["device", "host"])
def test_it_goes_on_from_its_state_to_the_bit(optimizer: str) -> None:
    made, again = (make(EVERYTHING, optimizer_device=optimizer) for _ in range(2))
    run(made)
    again.load_adapter_state(made.adapter_state())
    again.load_optimizer_state(*made.optimizer_state())
    assert_same(again, made)


def test_biases_of_frozen_layers_are_frozen() -> None:
    made = make(lora(bias="all"), frozen_layers=(0,))
    before = made.adapter_state()
    run(made)
    for name, tensor in made.adapter_state().items():
        assert torch.equal(tensor, before[name]) == (".layers.0." in name), name


@pytest.mark.parametrize("case", ["all biases", "modules"])
def test_its_estimate_is_what_it_takes(case: str) -> None:
    load = Load([SequenceSize(tokens=t, target_tokens=t // 2) for t in (90, 71, 40)], [])
    plan = steps.plan(micro_batch_size=2, recompute_layers=(0,), compute_dtype="bfloat16")
    given = (config(), plan, settings(lora(**CASES[case])), load)
    sources = (None, RandomWeights(torch.device("cpu")))
    found, taken = (trace_step(*given, source) for source in sources)
    # but for buffers while loading, which on the CPU are where they should be
    peaks = [{**trace.phase_peak_bytes, "load": 0} for trace in (found, taken)]
    assert peaks[0] == peaks[1]
    made = build_step(config(), plan, given[2], RandomWeights(torch.device("cpu")))
    sizes = [rounded(4 * p.numel()) for p in made.adapters.values()]
    assert found.components["adapters"] == sum(sizes)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["q_proj", "mlp", "default", "nothing", "base_layer", "layers.0", "self_attn"]
)
def test_other_modules_are_refused_by_name(module: str) -> None:
    with pytest.raises(UserError, match=f"has {module};.* lm_head, .*norm.*target_modules"):
        make(lora(modules_to_save=(module,)))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_table_for_both_is_refused(module: str) -> None:
    with pytest.raises(UserError, match=f"has {module}; .* one table .* leave it out.* norm"):
        step_skeleton(steps.config(), steps.plan(), settings(lora(modules_to_save=(module,))))


@pytest.mark.parametrize(("module", "place"), [("embed_tokens", "embedding"), ("lm_head", "head")])
def test_what_is_trained_stays_on_the_device(module: str, place: str) -> None:
    of = lora(modules_to_save=(module,))
    with pytest.raises(UserError, match=r"plan\.embedding or plan\.head"):
        make(of, **{place: "host"})
    size = model_size(config(), settings(of))
    free = Freedom.most(steps.plan().replace(device="cuda"), size)
    assert {"embedding": free.embedding, "head": free.head} == {
        "embedding": place != "embedding",
        "head": place != "head",
    }
    assert size.trained_whole == 64 * VOCABULARY


@pytest.mark.parametrize("plan", [{"checkpoints": "host"}, {"compute_dtype": "float8"}], ids=str)
def test_what_needs_a_step_by_hand_is_refused(plan: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"by hand .*embed_tokens\.weight is trained"):
        make(EVERYTHING, recompute_layers=(0, 1), **plan)


def test_the_adapter_on_disk_is_what_was_learned(tmp_path: Path) -> None:
    made = make(EVERYTHING)
    run(made, 1)
    state = made.adapter_state()
    described = adapter_config(EVERYTHING, lora_targets(made.model), base_model="a", revision=None)
    assert described["modules_to_save"] == sorted(ENDS)
    save_adapter(tmp_path, state, described)
    found = load_adapter(tmp_path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
