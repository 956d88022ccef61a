"""Line numbers in docs/: each link to a name in the source leads to the line that defines it.

    python -m benchmarks.lines

A link reads [`Class.method`](../src/nnclr/FILE.py#L12); the number is written anew, names are checked.
"""

import ast
import re
from pathlib import Path

DOCS = Path("docs")
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)+src/[\w./-]+\.py)#L\d+\)")


def definitions(path):
    """Dotted name -> line, of the classes, functions and fields of a file."""
    lines = {}

    def visit(nodes, prefix):
        for node in nodes:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                lines[prefix + node.name] = node.lineno
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines[prefix + node.target.id] = node.lineno

    visit(ast.parse(path.read_text()).body, "")
    return lines


def renumbered(text, page):
    """The page with the numbers of today; KeyError for a name that its file does not define."""
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{definitions(page.parent / m[2])[m[1]]})", text)


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        page.write_text(renumbered(page.read_text(), page))
