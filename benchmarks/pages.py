"""Parts of documents that are made from results, each between two comments."""


def replace_part(text: str, begin: str, end: str, part: str) -> str:
    """Returns a document with a new part between two comments.

    >>> replace_part("before <!-- a --> old <!-- b --> after", "<!-- a -->", "<!-- b -->", "new")
    'before <!-- a -->\\n\\nnew\\n\\n<!-- b --> after'
    """
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"
