"""Values that modules and functions keep from one call for the next."""
