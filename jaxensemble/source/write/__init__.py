"""The way from an outline to text."""
