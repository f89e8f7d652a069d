"""Each figure's program. `results/` keeps what they printed, on what device, when."""
