"""The little of a model that decides which plans there are. This module imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """The little of a model that candidates depend on."""

    layers: int
    vocabulary: int
    tied: bool = False  # the head's table is the embedding's
    embedding_moves: bool = True  # the embedding can be on the host
    head_moves: bool = True
    by_hand: bool = True  # its layers have a step by hand (`fitlora.step.families`)
    trained_whole: int = 0  # parameters that are trained beside the adapters
    table_bytes: int | None = None  # of the head's table, where that is known
    # weights of a layer's linear ones, of each kind of layer; None where that is not known
    layer_weights: frozenset[int] | None = None

    @classmethod
    def of(cls, config: Any) -> "ModelSize":
        """Of a transformers config, as far as that tells."""
        text = config.get_text_config()
        hidden = getattr(text, "hidden_size", None)
        return cls(
            layers=text.num_hidden_layers,
            vocabulary=text.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            head_moves=not getattr(text, "final_logit_softcapping", None),
            table_bytes=hidden and 2 * text.vocab_size * hidden,
        )
