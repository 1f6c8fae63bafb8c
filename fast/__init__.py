"""Drop-ins that give the same numbers faster; each is tested against the plain version."""
