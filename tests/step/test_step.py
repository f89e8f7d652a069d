"""The step itself: gradients that do not depend on how a batch is split, and that are right."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fitlora.step.training_step import learning_rate
from tests.step import steps


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"micro_batch_size": 3, "recompute_layers": (0, 1)},
        {"recompute_layers": (1,)},
        {"loss_chunk_tokens": 5},
    ],
)
def test_gradients_do_not_depend_on_the_plan(changes: dict[str, object]) -> None:
    batch = steps.sequences(7)
    whole = steps.gradients(steps.step(), batch)
    other = steps.gradients(steps.step(steps.plan(**changes)), batch)
    assert steps.distance(other, whole) < 2e-5


@pytest.mark.parametrize("attention", ["flash", "plain"])
def test_a_step_in_float16_is_near_float32s(attention: str) -> None:
    assert steps.error_in_float16(attention, device="cpu") < 0.01


def test_dropout_is_on_in_these_gradients() -> None:
    batch = steps.sequences(7)
    with_dropout = steps.gradients(steps.step(), batch)
    without = steps.gradients(steps.step(the_settings=steps.settings(dropout=0.0)), batch)
    assert steps.distance(with_dropout, without) > 0.01


def test_gradients_of_devices_add_up_to_those_of_one() -> None:
    batch = steps.sequences(7)
    whole = steps.gradients(steps.step(), batch)
    total = sum(s.target_tokens for s in batch)
    plan = steps.plan(devices=3, micro_batch_size=2)
    parts = [
        steps.gradients(steps.step(plan), batch[rank::3], total_target_tokens=total)
        for rank in range(3)
    ]
    summed = {name: sum(part[name] for part in parts) for name in whole}
    assert steps.distance(summed, whole) < 2e-5


@pytest.mark.parametrize("bits", [4, 16])
def test_gradients_are_those_of_plain_pytorch(bits: int) -> None:
    """The reference: dense weights, LoRA as two products, each sequence alone, autograd for all."""
    batch = steps.sequences(7)
    settings = steps.settings(dropout=0.0, bits=bits)
    made = steps.step(the_settings=settings)
    found = steps.gradients(made, batch)
    reference = steps.plain_model(made)
    total = sum(s.target_tokens for s in batch)
    for sequence in batch:
        ids = torch.tensor([sequence.tokens])
        logits = reference(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.tensor(sequence.tokens)[1:]
        labels = labels.masked_fill(~torch.tensor(sequence.learned)[1:], -100)
        (F.cross_entropy(logits, labels, reduction="sum") / total).backward()
    expected = {name: reference.get_parameter(name).grad for name in found}
    assert steps.distance(found, expected) < 1e-4


def test_loss_is_the_mean_over_target_tokens() -> None:
    batch = steps.sequences(5)
    made = steps.step(
        steps.plan(effective_batch_size=5, micro_batch_size=2, evaluation_batch_size=3)
    )
    summed, count = made.evaluate(batch)
    assert count == sum(sum(s.learned[1:]) for s in batch)
    reference = steps.plain_model(made)
    expected = 0.0
    for sequence in batch:
        ids = torch.tensor(sequence.tokens)
        logits = reference(input_ids=ids[None], use_cache=False).logits[0, :-1].detach()
        chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected -= float(chosen[torch.tensor(sequence.learned)[1:]].sum())
    assert float(summed) == pytest.approx(expected, rel=1e-5)


def test_sequences_do_not_see_each_other() -> None:
    """A sequence's loss is the same alone as behind another one."""
    first, second = steps.sequences(2)
    made = steps.step(steps.plan(effective_batch_size=2, micro_batch_size=2))
    alone = [float(made.evaluate([s])[0]) for s in (first, second)]
    assert float(made.evaluate([first, second])[0]) == pytest.approx(sum(alone), rel=1e-6)


def test_golden_run() -> None:
    """Losses of a seeded run, to notice a change of the arithmetic that nobody meant."""
    made = steps.step(the_settings=steps.settings(max_gradient_norm=1.0))
    losses = [
        float(made.run(steps.sequences(7, seed), step=seed, learning_rate=5e-2).loss)
        for seed in range(4)
    ]
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [4.880495, 4.891596, 4.846811, 4.842150]


def test_optimizers_train() -> None:
    for optimizer in ("adamw", "adamw_8bit"):
        made = steps.step(steps.plan(optimizer=optimizer))
        batch = steps.sequences(7)
        losses = [float(made.run(batch, step=i, learning_rate=2e-2).loss) for i in range(6)]
        assert losses[-1] < losses[0] - 0.05, optimizer


def test_clipping_bounds_the_update() -> None:
    """With plain numbers: AdamW divides by the gradient's size, so look at the gradients."""
    made = steps.step(the_settings=steps.settings(max_gradient_norm=1e-3))
    seen = {}
    made.optimizer.step = lambda: seen.update(  # type: ignore[union-attr]
        {n: p.grad.clone() for n, p in made.adapters.items()}
    )
    result = made.run(steps.sequences(7), step=0, learning_rate=1.0)
    norm = torch.stack([g.norm() for g in seen.values()]).norm()
    assert float(result.gradient_norm) > 0.01
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)],
)
def test_schedules(schedule: str, middle: float, last: float) -> None:
    train = steps.settings(schedule=schedule, warmup_steps=10, learning_rate=1.0).train
    rates = [learning_rate(step, 110, train) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(middle)
    assert rates[110] == pytest.approx(last, abs=1e-12)
    assert all(a < b for a, b in pairwise(rates[:11]))


@pytest.mark.parametrize("optimizer", ["device", "host"])
def test_a_device_without_a_share_takes_part(optimizer: str) -> None:
    """An effective batch smaller than the devices: every device sums tensors of the same shapes."""
    plan = steps.plan(
        effective_batch_size=2, devices=3, micro_batch_size=1, optimizer_device=optimizer
    )
    made = steps.step(plan)
    reduced: list[Tensor] = []
    made.run(
        [],
        step=0,
        learning_rate=0.1,
        total_target_tokens=10,
        reduce_gradients=reduced.extend,
    )
    *gradients, loss = reduced
    assert loss.shape == ()
    assert not any(gradient.any() for gradient in gradients)
    count = sum(p.numel() for p in made.adapters.values())
    if optimizer == "device":
        assert len(gradients) == 1  # one sum for all
        assert count <= gradients[0].numel() < 1.5 * count
    else:
        assert sum(gradient.numel() for gradient in gradients) == count


def test_gradients_on_the_host_add_up_over_devices() -> None:
    """With the optimizer on the host: its gradients are those that a device would have summed."""
    batch = steps.sequences(7)
    found: dict[str, list[Tensor]] = {}
    for optimizer in ("device", "host"):
        plan = steps.plan(micro_batch_size=2, optimizer_device=optimizer)
        seen = found[optimizer] = []
        steps.step(plan).run(
            batch,
            step=0,
            learning_rate=0.0,
            reduce_gradients=lambda tensors, seen=seen: seen.extend(t.clone() for t in tensors),
        )
    norms = [torch.cat([t.flatten() for t in found[name]]).norm() for name in found]
    assert norms[0] > 0
    torch.testing.assert_close(norms[1], norms[0])
