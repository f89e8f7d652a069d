"""From whatever people have to sequences of tokens: where rows lie, what they mean, how they read."""
