"""Which Plan: candidates, their cost, and the probe that proves one."""
