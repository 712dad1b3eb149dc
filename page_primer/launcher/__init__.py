"""`page-primer run`: a command, and every Python process it leads to, primed."""
