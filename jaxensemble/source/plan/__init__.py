"""The class, function or statement that every module becomes."""
