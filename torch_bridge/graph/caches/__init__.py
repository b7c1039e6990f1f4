"""What modules and functions keep from one call for the next."""
