"""Precision that switches: what decoder layers compute in follows what their numbers need.

A step whose loss or gradients are no numbers changes no weight and is done again, in this order:

- In float16 gradients are multiplied by a loss scale, so that small ones are not lost (Micikevicius et
  al. 2018, arXiv:1710.03740). Where a gradient overflows and the loss does not, the scale was too large
  and is halved; after `GROWTH_STEPS` steps without that it is doubled.
- Under `train.precision: dynamic` the layers then compute in the next wider precision: bfloat16 after
  float8, float32 after bfloat16 and float16. So they do after a spike of the loss, too: a loss that lies
  `SPIKE` standard deviations above the mean of the last `WINDOW` steps. Where it is a spike in the wider
  precision as well, the data is the reason: the step counts, and the layers go back at once.
- After a calm stretch they go back; the stretch doubles with each time that they had to leave.

Adapters are float32 in every precision (with an optimizer on the host: its masters), and so are the
optimizer's states: a switch changes none of them. The embedding and the head stay as they are stored.
What decides is a function of losses and norms, which all processes agree on, and of a state that
checkpoints keep.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fitlora.plan import WIDER, ComputeDtype, Plan
from fitlora.step.training_step import is_finite
from fitlora.training.recovery import Recovery

# PyTorch's GradScaler has the same numbers, but for the ends.
FIRST_SCALE, LEAST_SCALE, MOST_SCALE, GROWTH_STEPS = 2.0**16, 1.0, 2.0**24, 2000
CALM_STEPS, MOST_DOUBLINGS = 50, 5
WINDOW, FEWEST = 20, 10  # losses that a spike is told by
SPIKE = 6.0
LEAST_DEVIATION = 0.02  # of the mean: losses that hardly differ have no spikes of a thousandth


class PrecisionState(BaseModel):
    """What the next step's precision depends on beside the Plan. A checkpoint keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    loss_scale: float = FIRST_SCALE
    scaled_at: int = 0  # the step after which the scale was changed
    switched_at: int = 0  # the step after which the layers' precision was
    widened: int = 0  # how often they went to a wider one
    spike_at: int | None = None  # the step that is done again because of a spike
    losses: tuple[float, ...] = Field((), strict=False)  # of the last steps


class Precision:
    """Which steps count, and what the layers compute in.

    recovery: has the step and the Plan in use. record: takes the event of each change. dynamic: whether
    the layers' precision may change; the loss scale of float16 always does.
    """

    def __init__(
        self, recovery: Recovery, record: Callable[[dict[str, Any]], None], *, dynamic: bool
    ) -> None:
        self.state = PrecisionState()
        self.dynamic = dynamic
        self._recovery, self._record = recovery, record
        self._cause = ""
        self._scale_is_to_blame = False

    @property
    def loss_scale(self) -> float:
        """What the step multiplies gradients by on their way."""
        return self.state.loss_scale if self._plan.storage_dtype == "float16" else 1.0

    @property
    def wider(self) -> ComputeDtype | None:
        """What the layers would compute in after the next switch up; None where nothing is wider."""
        return WIDER.get(self._plan.layers_compute_in)

    def accept(self, done: int, loss: float, norm: float) -> bool:
        """Whether the weights may be updated. done: optimizer steps before this one."""
        if not is_finite(loss, norm):
            self._scale_is_to_blame = math.isfinite(loss) and self.loss_scale > LEAST_SCALE
            what = "gradients' norm" if math.isfinite(loss) else "loss"
            self._cause = f"the {what} is {norm if math.isfinite(loss) else loss}"
            return False
        may_widen = self.dynamic and self.wider is not None and self.state.spike_at != done
        limit = self._spike_limit()
        if may_widen and limit is not None and loss > limit:
            self._scale_is_to_blame = False
            self._cause = f"a spike: the loss is {loss:.4f}, and {limit:.4f} was the limit"
            self._change(spike_at=done)
            return False
        return True

    def refused(self, done: int) -> bool:
        """Changes what made `accept` say no, so that the step can be done again; False at the end."""
        if self._scale_is_to_blame:
            self._change(loss_scale=self.state.loss_scale / 2, scaled_at=done)
            self._tell(done + 1, self._cause, self._plan.layers_compute_in)
            return True
        wider = self.wider
        if not self.dynamic or wider is None:
            return False
        self._change(widened=self.state.widened + 1)
        self._turn(done, wider, self._cause)
        return True

    def count(self, done: int, loss: float) -> None:
        """After a step that counted. done: optimizer steps with it."""
        state = self.state
        limit = self._spike_limit()
        if state.spike_at == done - 1 and limit is not None and loss > limit:
            narrower = self._narrower()
            if narrower is not None:
                self._turn(
                    done, narrower, f"the loss is a spike in {self._plan.layers_compute_in}, too"
                )
        self._change(losses=(*state.losses, loss)[-WINDOW:])
        if done - state.scaled_at >= GROWTH_STEPS and state.loss_scale < MOST_SCALE:
            self._change(loss_scale=state.loss_scale * 2, scaled_at=done)
        calm = CALM_STEPS * 2 ** min(MOST_DOUBLINGS, max(0, state.widened - 1))
        narrower = self._narrower()
        if narrower is not None and done - self.state.switched_at >= calm:
            self._turn(done, narrower, f"{calm} calm steps")

    @property
    def _plan(self) -> Plan:
        return self._recovery.ladder.plan

    def _narrower(self) -> ComputeDtype | None:
        """What the layers computed in before the last switch up."""
        found, dtype = None, self._plan.compute_dtype
        while dtype != self._plan.layers_compute_in:
            found, dtype = dtype, WIDER[dtype]
        return found

    def _spike_limit(self) -> float | None:
        """The highest loss that is no spike; None as long as there are few to tell by."""
        losses = self.state.losses
        if len(losses) < FEWEST:
            return None
        mean = statistics.fmean(losses)
        return mean + SPIKE * max(statistics.pstdev(losses), LEAST_DEVIATION * abs(mean))

    def _turn(self, done: int, dtype: ComputeDtype, cause: str) -> None:
        before = self._plan.layers_compute_in
        self._recovery.turn(layer_dtype=self._plan.in_precision(dtype).layer_dtype)
        self._change(switched_at=done)
        self._tell(done + 1, cause, before)

    def _tell(self, step: int, cause: str, before: ComputeDtype) -> None:
        self._record(
            {
                "event": "precision",
                "step": step,
                "cause": cause,
                "before": before,
                "after": self._plan.layers_compute_in,
                "loss_scale": self.loss_scale,
            }
        )

    def _change(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)
