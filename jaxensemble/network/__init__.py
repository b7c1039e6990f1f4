"""A network as plain data, and what is known of it."""
