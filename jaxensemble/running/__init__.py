"""The program that runs all members, and the plans for it."""
