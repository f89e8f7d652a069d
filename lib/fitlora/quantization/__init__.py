"""From a 16-bit checkpoint to a 4-bit one."""
