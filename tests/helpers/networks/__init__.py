"""Networks written by hand."""
