"""How the members of an ensemble run as one program."""
