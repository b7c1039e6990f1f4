"""Which class, function or statement every module becomes."""
