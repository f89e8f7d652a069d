"""How many bytes, at which instant, for what: traced, estimated and measured."""
