"""The little of a model that decides which plans there are. This module imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """The little of a model that candidates depend on."""

    layers: int
    vocabulary: int
    tied: bool = False  # the head's table is the embedding's
    head_moves: bool = True  # the head can be on the host
    by_hand: bool = True  # its layers have a step by hand (`fitlora.step.families`)

    @classmethod
    def of(cls, config: Any, *, by_hand: bool = True) -> "ModelSize":
        """Of a transformers config."""
        text = config.get_text_config()
        return cls(
            layers=text.num_hidden_layers,
            vocabulary=text.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            head_moves=not getattr(text, "final_logit_softcapping", None),
            by_hand=by_hand,
        )
