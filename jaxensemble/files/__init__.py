"""Files that strangers may have written: whole or not at all, and believed in nothing."""
