"""The examples of docs/other-libraries.md, as text."""
import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / 'docs' / 'other-libraries.md').read_text(encoding='utf-8')


def example(section: str, number: int = 0) -> str:
    """A block of Python under a heading."""
    text = PAGE.partition(f'\n## {section}\n')[2].partition('\n## ')[0]
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)[number]
